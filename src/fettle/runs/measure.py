"""The measurements taken before and after training: loss, and answers to rows that are not trained on."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fettle.engine.text import Engine
from fettle.evaluation import Answer, Question, answer, exact_share
from fettle.events import Report, Sample, progress
from fettle.runs.report import Score

REPORTED_SAMPLES = 12
"""Samples in the report; more would be too long to read."""


@dataclass(slots=True)
class Answered:
    """A question's prompt, the expected answer, and the model's answer."""

    prompt: str
    expected: str
    answer: str


@dataclass(slots=True)
class Measurement:
    """A model's scores. held_out: scores on held-out rows by name, loss and others that depend on the method; empty if
    there are none. exact: the
    exact-match rate on held-out rows, None if there are no questions; kept_exact: the same on `keep_data`.
    """

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
        """The measurement as JSON-serializable data."""
        return asdict(self)


def measure(
    engine: Engine,
    held_out: dict[str, float],
    held_out_questions: Sequence[Question],
    keep_questions: Sequence[Question],
    report: Report,
    when: str,
) -> Measurement:
    """Answer the questions and add the held-out scores, which the trainer computes.

    when: for the progress line, such as "before training".
    """
    answers: list[Answer] = []
    kept_answers: list[Answer] = []
    held, kept = len(held_out_questions), len(keep_questions)
    if total := held + kept:
        parts = [f"{held} held-out rows"] if held else []
        parts += [f"{kept} rows of old skills"] if kept else []
        with progress(f"{when}: answering {' and '.join(parts)}", report) as advance:
            count = itertools.count(1)
            answers, kept_answers = (
                answer(engine, asked, lambda: advance(next(count) / total))
                for asked in (held_out_questions, keep_questions)
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
        Score("held-out exact match", before.exact, after.exact, "%"),
        Score("held-out loss", before.held_out.get("loss"), after.held_out.get("loss"), "", "lower"),
        Score(
            "held-out token accuracy",
            before.held_out.get("token_accuracy"),
            after.held_out.get("token_accuracy"),
            "%",
        ),
        Score(
            "held-out pairs, chosen answer preferred",
            before.held_out.get("preferred"),
            after.held_out.get("preferred"),
            "%",
        ),
        Score(
            "held-out answers, good told from bad",
            before.held_out.get("told_apart"),
            after.held_out.get("told_apart"),
            "%",
        ),
        Score("old skills: exact match", before.kept_exact, after.kept_exact, "%"),
    ]
    return [row for row in rows if row.before is not None or row.after is not None]


def samples(before: Measurement, after: Measurement) -> list[Sample]:
    """The first answers before and after, paired."""
    pairs = zip(before.answers[:REPORTED_SAMPLES], after.answers[:REPORTED_SAMPLES], strict=True)
    return [Sample(a.prompt, a.expected, b.answer, a.answer) for b, a in pairs]
