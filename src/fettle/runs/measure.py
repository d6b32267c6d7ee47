"""One set of measurements, taken before and after a run: loss, and answers to rows not trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.engine.decode import BATCH_SIZE
from fettle.evaluation import Question, answer, exact_share
from fettle.runs.progress import show_share
from fettle.runs.report import Sample, Score

SHOWN = 12
"""Samples in the report; more would not be read."""


@dataclass(slots=True)
class Answered:
    """One question's prompt, the right answer, the answer given."""

    prompt: str
    expected: str
    answer: str


@dataclass(slots=True)
class Measurement:
    """What a model scored. loss and token_accuracy: on held-out rows, empty without any. exact: the share of
    answers that were right to the letter, None where nothing was asked; kept_*: the same for `--keep-data`."""

    held_out: dict[str, float] = field(default_factory=dict)
    exact: float | None = None
    kept_exact: float | None = None
    answers: list[Answered] = field(default_factory=list)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Measurement":
        """Rebuild one from `as_facts`. Raises TypeError or KeyError for anything else."""
        found = cls(**{**facts, "answers": [Answered(**a) for a in facts["answers"]]})
        figures = [*found.held_out.values(), found.exact or 0.0, found.kept_exact or 0.0]
        texts = [text for each in found.answers for text in (each.prompt, each.expected, each.answer)]
        if not all(isinstance(figure, int | float) for figure in figures):
            raise TypeError("a score is not a number")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("an answer is not a text")
        return found

    def as_facts(self) -> dict[str, Any]:
        """A form that JSON holds."""
        return asdict(self)


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: dict[str, float],
    asked: Sequence[Question],
    kept: Sequence[Question],
    console: Console,
    when: str,
    *,
    at_once: int = BATCH_SIZE,
) -> Measurement:
    """Answer the questions and add the held-out figures, which the trainer computes.

    when: "before training", say. at_once: how many questions are answered together.
    """
    answers, kept_answers = [], []
    if total := len(asked) + len(kept):
        parts = [f"{len(asked)} of the held-out rows"] if asked else []
        parts += [f"{len(kept)} of --keep-data"] if kept else []
        with show_share(f"{when}: answering {' and '.join(parts)}", console) as advance:
            answers = answer(model, tokenizer, asked, lambda count: advance(count / total), at_once=at_once)
            kept_answers = answer(
                *(model, tokenizer, kept, lambda count: advance((len(asked) + count) / total)),
                at_once=at_once,
            )
    return Measurement(
        held_out=held_out,
        exact=exact_share(answers) if answers else None,
        kept_exact=exact_share(kept_answers) if kept_answers else None,
        answers=[Answered(a.question.prompt, a.question.expected, a.answer) for a in answers],
    )


def scores(before: Measurement, after: Measurement) -> list[Score]:
    """The two measurements as rows of the before/after table."""
    rows = [
        Score("held-out answers exact", before.exact, after.exact, "%"),
        Score("held-out loss", before.held_out.get("loss"), after.held_out.get("loss"), "", "lower"),
        Score(
            "held-out tokens predicted",
            before.held_out.get("token_accuracy"),
            after.held_out.get("token_accuracy"),
            "%",
        ),
        Score("old skills: answers exact", before.kept_exact, after.kept_exact, "%"),
    ]
    return [row for row in rows if row.before is not None or row.after is not None]


def samples(before: Measurement, after: Measurement) -> list[Sample]:
    """The first answers side by side."""
    pairs = zip(before.answers[:SHOWN], after.answers[:SHOWN], strict=True)
    return [Sample(a.prompt, a.expected, b.answer, a.answer) for b, a in pairs]
