"""Generate text from a prompt, through transformers' `generate`.

With a chat template the prompt becomes a user turn; without one, or with `raw`, the prompt itself is continued.
Generation stops at the template's end-of-turn token as well as at the tokens in generation_config.json, as some
checkpoints do not list theirs. No other option of that file is used (such as a repetition penalty), so temperature 0
is greedy decoding for every checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from fettle.data import end_of_turn, generation_prompt
from fettle.errors import ModelFault, UserError, option
from fettle.models.modes import evaluating

Model: TypeAlias = PreTrainedModel | PeftModel

BATCH_SIZE = 64
"""Texts generated together."""

COLDEST = 1e-6
"""Lower temperatures count as 0, as logits divided by them overflow."""

LONGEST_COMPLETION = 512
"""Default for the maximum number of new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0: greedy decoding.

    max_new_tokens: None means LONGEST_COMPLETION, or the rest of the context if that is less.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"{option('max_new_tokens')} is {self.max_new_tokens}; expected 1 or more.")
        if not 0 <= self.temperature < math.inf:  # also refuses NaN
            raise UserError(
                f"{option('temperature')} is {self.temperature}; expected 0 (greedy decoding) or more."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"{option('top_p')} is {self.top_p}; expected a number above 0, at most 1.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(
                f"{option('seed')} is {self.seed}; expected a whole number from 0 to {2**32 - 1}."
            )


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    raw: bool = False,
    system: str | None = None,
    sampling: Sampling = Sampling(),  # frozen
) -> str:
    """Return the completion of one prompt, without the prompt."""
    text = prompt_text(tokenizer, prompt, raw=raw, system=system)
    return complete(model, tokenizer, [text], sampling, is_rendered=is_chat(tokenizer, raw))[0]


def is_chat(tokenizer: PreTrainedTokenizerBase, raw: bool) -> bool:
    """Whether a prompt becomes a user turn."""
    return bool(tokenizer.chat_template) and not raw


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool = False, system: str | None = None
) -> str:
    """Return the text for the model to continue: the prompt as a user turn in its chat template, or unchanged."""
    if not prompt.strip():
        raise UserError("The prompt is empty; give at least one word.")
    if not is_chat(tokenizer, raw):
        if system is not None:
            raise UserError(
                f"{option('system')} needs a model with a chat template, and cannot be combined with {option('raw')}."
            )
        return prompt
    messages = [{"role": "system", "content": system}] if system else []
    return generation_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}])


@torch.inference_mode()
def complete(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    sampling: Sampling,
    *,
    is_rendered: bool,
    on_progress: Callable[[float], None] | None = None,
    at_once: int = BATCH_SIZE,
) -> list[str]:
    """Return the continuation of each text, in order. at_once: the batch size.

    is_rendered: the texts come from a chat template, which has already added special tokens. on_progress is called
    after every token of a batch with the number of texts completed so far, where those of the batch count in part.
    """
    processors = LogitsProcessorList([_RequireFinite(model)])
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths need little padding
    answers = [""] * len(texts)
    _seed(sampling)
    with evaluating(model):
        size = at_once if getattr(model, "is_batchable", True) else 1
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = _encode(model, tokenizer, [texts[i] for i in chosen], is_rendered)
            config = GenerationConfig(**_arguments(model, tokenizer, inputs, sampling))
            watch = StoppingCriteriaList()
            if on_progress is not None:
                watch.append(_TellProgress(on_progress, start, len(chosen), config.max_new_tokens))
            with _decoding_by(model, config):
                output = model.generate(**inputs, stopping_criteria=watch, logits_processor=processors)
            for i, prompt_ids, ids in zip(chosen, inputs["input_ids"], output, strict=True):
                answers[i] = _new_words(tokenizer, prompt_ids, ids)
    return answers


class _TellProgress(StoppingCriteria):
    """Never stops; transformers calls it after every token, and it reports how many texts are completed."""

    def __init__(self, tell: Callable[[float], None], before: int, batch: int, new_tokens: int) -> None:
        self.tell, self.before, self.batch = tell, before, batch
        self.new_tokens, self.tokens = new_tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        self.tokens += 1
        self.tell(self.before + self.batch * self.tokens / self.new_tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class _RequireFinite(LogitsProcessor):
    """Changes nothing; raises ModelFault for logits that are NaN or Inf, before any sampling.

    The maximum shows both, since it propagates NaN: a few µs for 32,000 logits.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(-1).isfinite().all():
            raise not_finite(self.model)
        return scores


def not_finite(model: Model) -> ModelFault:
    """Return the error for a model whose logits are NaN or Inf."""
    cure = "fetch or export it again"
    if model.dtype == torch.float16:
        cure += f", or use {option('dtype')} float32, as float16 may overflow"
    return ModelFault(
        f"{model.name_or_path}: the model's logits are NaN or Inf, so its weights"
        f"{' or those of its adapter' if isinstance(model, PeftModel) else ''} are damaged: {cure}."
    )


def stream(
    model: Model, tokenizer: PreTrainedTokenizerBase, text: str, sampling: Sampling, *, is_rendered: bool
) -> Iterator[str]:
    """Yield the continuation of one text in pieces, as they are generated."""
    inputs = _encode(model, tokenizer, [text], is_rendered)
    config = GenerationConfig(**_arguments(model, tokenizer, inputs, sampling))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode(), evaluating(model), _decoding_by(model, config):
                model.generate(
                    **inputs, streamer=streamer, logits_processor=LogitsProcessorList([_RequireFinite(model)])
                )
        except BaseException as error:
            failures.append(error)
            streamer.end()

    _seed(sampling)
    worker = Thread(target=work, daemon=True)
    worker.start()
    yield from streamer
    worker.join()
    if failures:
        raise failures[0]


def _encode(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    is_rendered: bool,
) -> dict[str, torch.Tensor]:
    batch = tokenizer(
        texts,
        add_special_tokens=not is_rendered,
        padding=len(texts) > 1,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    )
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _new_tokens(model: Model, prompt_tokens: int, sampling: Sampling) -> int:
    """Return how many tokens may follow the prompt. Raises UserError if the context is too short for them."""
    context: int = model.config.max_position_embeddings
    room = context - prompt_tokens
    wanted = sampling.max_new_tokens or max(1, min(room, LONGEST_COMPLETION))
    if wanted > room:
        raise UserError(
            f"The prompt's {prompt_tokens} tokens and {wanted} new tokens ({option('max_new_tokens')}) exceed the "
            f"model's context of {context} tokens; reduce one of them."
        )
    return wanted


def _arguments(
    model: Model, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, torch.Tensor], sampling: Sampling
) -> dict[str, Any]:
    """Return the arguments of the GenerationConfig; stop ids include those of the checkpoint's own config."""
    arguments: dict[str, Any] = {
        "max_new_tokens": _new_tokens(model, inputs["input_ids"].shape[1], sampling),
        "do_sample": sampling.temperature > COLDEST,
        "eos_token_id": stop_ids(model.generation_config.eos_token_id, tokenizer),
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "use_cache": True,
    }
    if sampling.temperature > COLDEST:
        arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return arguments


def _seed(sampling: Sampling) -> None:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)


def stop_ids(named: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the stop tokens: those of the generation config, the end of text, and the template's end of turn."""
    stops = [] if named is None else list(named) if isinstance(named, list) else [named]
    if wrong := [stop for stop in stops if type(stop) is not int or not 0 <= stop < 2**31]:
        raise UserError(f"generation_config.json: eos_token_id has {wrong[0]!r}; expected token ids.")
    ends = [tokenizer.eos_token, end_of_turn(tokenizer) if tokenizer.chat_template else None]
    found = (tokenizer.convert_tokens_to_ids(token) for token in ends if token is not None)
    return list(dict.fromkeys([*stops, *(index for index in found if index is not None)]))


def _new_words(tokenizer: PreTrainedTokenizerBase, prompt_ids: torch.Tensor, ids: torch.Tensor) -> str:
    """Decode together with the prompt, as some tokenizers drop the space before the first word of a text."""
    keep = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    prompt = tokenizer.decode(prompt_ids, **keep)
    whole = tokenizer.decode(ids, **keep)
    return (
        whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(ids[len(prompt_ids) :], **keep)
    )


@contextmanager
def _decoding_by(model: Model, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's generation config, which transformers uses for all options that are not set."""
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    originals = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.generation_config = original
