"""Rows as they were read: `Row`, and a list of rows with a record of what was read and what was skipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fettle.data.turns import Message
from fettle.errors import UserError

SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One row of training data: a chat (`messages`), a `prompt` with its `completion`, or plain `text`.

    where: the file and line it came from, as error messages name it.
    format: the name of its format, as in the table in `formats.py`.
    completion_turns: if set, only that many of the last messages are trained on, not earlier answers.
    is_trained: False if the row itself has `weight: 0`.
    unused: the columns that its format does not use.
    is_rendered: `prompt` and `completion` are already rendered in the model's chat template (see `fit.py`).
    """

    where: str
    format: str
    messages: tuple[Message, ...] = ()
    completion_turns: int | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    is_trained: bool = True
    unused: tuple[str, ...] = ()
    is_rendered: bool = False


@dataclass(slots=True)
class Reading:
    """How rows were read.

    notes: which files and splits were read and which were left out, if there was a choice.
    bad: rows that were skipped because they are not valid training data, each as "place: reason".
    """

    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


class Rows(list[Row]):
    """A list of rows, with how they were read."""

    def __init__(self, rows: Iterable[Row] = (), reading: Reading | None = None) -> None:
        super().__init__(rows)
        self.reading = reading or Reading()


class BadRows(UserError):
    """Rows that cannot be trained on: all of them, each as "place: reason", of `total` rows.

    way_out: a sentence at the end of the message that says what the caller offers to do about them.
    """

    def __init__(self, problems: Sequence[str], total: int, way_out: str = "") -> None:
        self.problems = list(problems)
        self.total = total
        shown = self.problems[:SHOWN_PROBLEMS]
        if len(self.problems) == 1:
            super().__init__(" ".join(filter(None, (shown[0], way_out))))
            return
        lines = [f"{len(self.problems):,} of {total:,} rows cannot be used:", *shown]
        if len(self.problems) > len(shown):
            lines.append(f"and {len(self.problems) - len(shown):,} more.")
        super().__init__("\n  ".join(lines) + (f"\n{way_out}" if way_out else ""))
