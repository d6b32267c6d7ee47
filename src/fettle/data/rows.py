"""Rows as they were read: one `Row` each, and a list of them that knows what was taken and what was not."""

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
    form: the form it was written in, as the table in `formats.py` names it.
    completion_turns: where set, only that many of the last messages are trained on, not earlier answers.
    is_trained: False where the row itself says `weight: 0`.
    unused: the columns that say nothing to its form.
    is_rendered: `prompt` and `completion` are written in the model's chat template already (see `fit.py`).
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

    notes: which files and splits were taken and which were left out, where there was a choice.
    bad: rows that are left out as no training data could be made of them, each as "place: reason".
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

    way_out: a sentence that ends the message, for what the caller offers to do about them.
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
