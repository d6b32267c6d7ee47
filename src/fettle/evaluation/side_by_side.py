"""Compare two models on the same rows: scores, distance, size and speed.

Each model reads the rows with its own tokenizer and chat template. For rows with the same ids in both, probabilities
are compared token by token; answers are compared as text, which works across tokenizers.
"""

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from fettle.adapters.model_ref import ModelRef, resolve
from fettle.checkpoints.dtypes import Dtype
from fettle.checkpoints.folder import weight_files
from fettle.data import Example, Row, read_rows, tokenize_rows
from fettle.data.tokenizer import Tokenizer
from fettle.engine.base import Model
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.load import load_ref
from fettle.engine.text import Engine
from fettle.errors import UserError, option, reason_of
from fettle.evaluation.answers import Answer, Question, answer, exact_share, questions
from fettle.evaluation.comparison import Comparison, Side
from fettle.evaluation.scoring import Distributions, Gap, OnExample, Scores, score
from fettle.evaluation.speed import measure_speed
from fettle.events import Report, ignore, progress


def compare(
    a: str | Path,
    b: str | Path,
    data: str | Path,
    *,
    samples: int = 64,
    max_length: int = 1024,
    dtype: Dtype = "auto",
    device: str | None = None,
    seed: int = 0,
    report: Report = ignore,
) -> Comparison:
    """Compare two models on at most `samples` rows of `data`, each truncated to `max_length` tokens.

    a, b: names as for `fettle.load`. dtype and device: of models that run in PyTorch. The models are loaded one at a
    time. Raises UserError for faults that the user can fix.
    """
    if samples < 1:
        raise UserError(f"{option('samples')} is {samples}; expected 1 or more.")
    refs = [resolve(name, need="run") for name in (a, b)]
    for ref in refs:  # faults of either are found before the first one runs
        _require_sound(ref)
    read = read_rows(data)
    rows = read if len(read) <= samples else Random(seed).sample(read, samples)
    opened = _open(refs[0], str(a), rows, max_length, dtype, device)
    distributions = Distributions(opened.examples, opened.engine.tokens.vocab_size)
    first = opened.read(report, distributions.keep)
    examples = opened.examples
    del opened
    gc.collect()
    torch.cuda.empty_cache()  # the second may run in llama.cpp, which cannot use PyTorch's cached memory
    opened = _open(refs[1], str(b), rows, max_length, dtype, device)
    gap = Gap((examples, first.scores, distributions), opened.examples, opened.engine.tokens.vocab_size)
    second = opened.read(report, gap.add)
    shared, equal, before_difference = _answers_alike(first.answers, second.answers, opened.engine.tokenizer)
    return Comparison(
        rows=len(rows),
        a=first.side(str(a), size_bytes(refs[0])),
        b=second.side(str(b), size_bytes(refs[1])),
        kl=gap.kl,
        kl_tokens=gap.kl_tokens,
        top_agreement=gap.top_agreement,
        answers=shared,
        equal_answers=equal,
        tokens_before_difference=before_difference,
        notes=(*read.reading.notes, *_notes(gap, len(opened.examples), shared)),
    )


def size_bytes(ref: ModelRef) -> int:
    """Return the size of a model's weights on disk, including an adapter's base."""
    files = ref.paths if ref.kind == "gguf" else [file for path in ref.paths for file in weight_files(path)]
    return sum(file.stat().st_size for file in files)


def _require_sound(ref: ModelRef) -> None:
    """Raise UserError if a model's files are damaged or do not belong together; no weights are read."""
    if ref.kind == "gguf":
        GGUFFile(ref.path)  # only llama.cpp can check it; closed at once
    else:
        _ = ref.tokenizer  # reading it checks all other files


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One model's results; answers by row number."""

    runtime: str
    scores: Scores
    answers: dict[int, Answer]
    prompt_tokens_per_second: float
    generated_tokens_per_second: float

    def side(self, name: str, size: int) -> Side:
        return Side(
            name=name,
            runtime=self.runtime,
            perplexity=self.scores.perplexity,
            tokens=self.scores.tokens,
            exact_share=exact_share(list(self.answers.values())),
            size_bytes=size,
            prompt_tokens_per_second=self.prompt_tokens_per_second,
            generated_tokens_per_second=self.generated_tokens_per_second,
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A loaded model with its tokenized rows; `asked` by row number."""

    name: str
    model: Model
    engine: Engine
    examples: list[Example]
    asked: dict[int, Question]

    def read(self, report: Report, on_example: OnExample) -> _Reading:
        """Score the examples, answer the questions, measure the speed."""
        with progress(f"scoring {self.name}", report) as advance:

            def on_scored(number: int, log_probs: torch.Tensor) -> None:
                on_example(number, log_probs)
                advance((number + 1) / len(self.examples))

            scores = score(self.engine.tokens, self.examples, on_scored)
        with progress(f"answers of {self.name}", report) as advance:
            answers = self._answers(advance)
        longest = max(self.examples, key=lambda example: len(example.input_ids))
        with progress(f"timing {self.name}", report):
            speed = measure_speed(self.engine.tokens, longest.input_ids)
        return _Reading(
            runtime=_runtime(self.model),
            scores=scores,
            answers=answers,
            prompt_tokens_per_second=speed.prompt,
            generated_tokens_per_second=speed.generation,
        )

    def _answers(self, advance: Callable[[float], None]) -> dict[int, Answer]:
        count = itertools.count(1)
        posed = list(self.asked.values())
        given = answer(self.engine, posed, lambda: advance(next(count) / len(posed)))
        by_question = {item.question: item for item in given}
        return {n: by_question[asked] for n, asked in self.asked.items() if asked in by_question}


def _open(
    ref: ModelRef, name: str, rows: list[Row], max_length: int, dtype: Dtype, device: str | None
) -> _Opened:
    """Load a model and tokenize the rows for it. dtype and device are ignored for a GGUF file."""
    model, tokenizer = load_ref(ref) if ref.kind == "gguf" else load_ref(ref, dtype=dtype, device=device)
    engine = Engine(model, tokenizer)
    longest = min(max_length, engine.context_tokens)
    try:
        examples = tokenize_rows(rows, tokenizer, max_length=longest).examples
    except UserError as error:
        raise UserError(f"{name}: {reason_of(error)}") from error
    asked = {number: q for number, row in enumerate(rows) for q in questions([row], tokenizer)}
    return _Opened(name, model, engine, examples, asked)


def _answers_alike(
    first: dict[int, Answer], second: dict[int, Answer], tokenizer: Tokenizer
) -> tuple[int, float | None, float | None]:
    """Return how many questions both answered, the share of identical answers, and the mean common prefix in tokens."""
    shared = [(first[number].answer, second[number].answer) for number in first.keys() & second.keys()]
    if not shared:
        return 0, None, None
    equal = sum(ours == theirs for ours, theirs in shared)
    before = [_tokens_in_common(ours, theirs, tokenizer) for ours, theirs in shared]
    return len(shared), equal / len(shared), sum(before) / len(shared)


def _tokens_in_common(ours: str, theirs: str, tokenizer: Tokenizer) -> int:
    """Return the length of the common prefix of two answers, in tokens."""
    cut: list[list[int]] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (ours, theirs)]
    return next((n for n, (a, b) in enumerate(zip(*cut, strict=False)) if a != b), min(map(len, cut)))


def _runtime(model: Model) -> str:
    if isinstance(model, GGUFFile):
        return "llama.cpp"
    return f"PyTorch, {str(model.dtype).removeprefix('torch.')}, {model.device.type}"


def _notes(gap: Gap, examples: int, answers: int) -> tuple[str, ...]:
    """Return what was left out, and why."""
    notes = []
    if gap.unequal == examples:
        notes.append(
            "The tokenizers or chat templates differ, so no row has the same tokens: KL and top-1 agreement "
            "are left out, and perplexities, being per token, cannot be compared."
        )
    elif gap.unequal:
        notes.append(
            f"{gap.unequal} of {examples} examples have different tokens in B: left out of KL and top-1 agreement."
        )
    if gap.unequal < examples and not gap.has_equal_vocabulary:
        notes.append("The vocabularies differ in size: KL is left out.")
    if not answers:
        notes.append("No row has both a prompt and an answer, so no answers are compared.")
    return tuple(notes)
