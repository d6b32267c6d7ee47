"""Rows as they were read, and a list of rows with a record of what was read and what was skipped.

Supervised training reads a `Row`.  Preference training reads two rows that answer the same question, or one row with a
label, so that whatever applies to the rows of supervised training applies to those as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fettle.data.tool_calls import Tool
from fettle.data.turns import Message
from fettle.errors import UserError, option

SHOWN_PROBLEMS = 10
Each = TypeVar("Each")
SKIP_HINT = f"Pass {option('skip_bad_rows')} to leave out and count such rows."


@dataclass(frozen=True, slots=True)
class Row:
    """One row of training data: a chat (`messages`), a `prompt` with its `completion`, or plain `text`.

    where: the file and line it came from, as error messages name it.
    format: the name of its format, as in the table in `formats.py`.
    completion_turns: if set, only that many of the last messages are trained on, not earlier answers.
    is_trained: False if the row itself has `weight: 0`.
    unused: the columns that its format does not use.
    is_rendered: `prompt` and `completion` are already rendered in the model's chat template (see `fit.py`).
    tools: the tools that the assistant of a chat may call (see `tool_calls.py`).
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
    tools: tuple[Tool, ...] = ()

    @property
    def content(self) -> str:
        """What identical rows have in common."""
        return repr((self.messages, self.prompt, self.completion, self.text, self.tools))

    @property
    def question(self) -> str | tuple[Message, ...]:
        """What the answer answers: the prompt, or the messages before the last `completion_turns`."""
        if self.prompt is not None:
            return self.prompt
        return self.messages[: len(self.messages) - (self.completion_turns or 0)]


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one question, of which `chosen` is the better one."""

    chosen: Row
    rejected: Row

    @property
    def where(self) -> str:
        return self.chosen.where

    @property
    def format(self) -> str:
        return self.chosen.format

    @property
    def prompt(self) -> str | tuple[Message, ...]:
        """The question of both."""
        return self.chosen.question

    @property
    def content(self) -> str:
        """What identical rows have in common: the question, so that no question is both trained on and held out."""
        return repr(self.prompt)


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A question and one answer, which is a good one or a bad one."""

    row: Row
    is_desirable: bool

    @property
    def where(self) -> str:
        return self.row.where

    @property
    def format(self) -> str:
        return self.row.format

    @property
    def prompt(self) -> str | tuple[Message, ...]:
        """The question."""
        return self.row.question

    @property
    def content(self) -> str:
        """As in `PreferenceRow`."""
        return repr(self.prompt)


@dataclass(slots=True)
class Reading:
    """How rows were read.

    notes: which files and splits were read and which were left out, if there was a choice.
    bad: rows that were skipped because they are not valid training data, each as "place: reason".
    """

    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


class RowList(list[Each]):
    """A list of rows of one kind, with how they were read."""

    def __init__(self, rows: Iterable[Each] = (), reading: Reading | None = None) -> None:
        super().__init__(rows)
        self.reading = reading or Reading()


class Rows(RowList[Row]):
    """The rows of supervised training."""


AnyRow = TypeVar("AnyRow", Row, PreferenceRow, LabelledRow)


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
