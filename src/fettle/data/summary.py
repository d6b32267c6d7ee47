"""How the data was read, shown before training starts.

A wrong mask or a wrong template does not fail, it teaches the wrong thing; the cheapest safeguard is to show one
example with its trained part marked, next to the counts of what was truncated, split, folded and dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fettle.data.chat import Segment
from fettle.data.rows import Reading
from fettle.errors import UserError

TRAINED_MARKS = ("⟦", "⟧")
_SHOWN_CHARACTERS = 600  # of each segment of the example
_SHOWN_DROPPED = 5


@dataclass(slots=True)
class Summary:
    """Counts over one dataset.

    rows: rows read; formats: how many of each format. examples: what they became (a long text becomes several).
    tokens / trained_tokens: in all examples / those with a loss. cut: rows truncated to `max_length`.
    split: texts divided into windows. folded_system: chats whose system text was moved into the user turn.
    dropped: (where, reason) of rows with nothing to train on. example: the first example's segments.
    bad: "where: reason" of rows skipped because they cannot be trained on. untrained: answers with a weight of 0.
    unused: columns and fields without effect, each with the number of rows or messages. noted: how rows were changed,
    each with the number of rows. read: the files and splits read.
    end_of_turn: the token that ends an answer; None without chats, or if the template has no such token.
    template: which chat template is used, if it is not the model's own. lengths: the tokens of each row before it is
    truncated or split, by where it came from.
    """

    max_length: int
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    split: int = 0
    folded_system: int = 0
    end_of_turn: str | None = None
    has_chats: bool = False
    formats: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    untrained: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    read: list[str] = field(default_factory=list)
    example: list[Segment] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
    lengths: dict[str, int] = field(default_factory=dict)

    def add_reading(self, reading: Reading) -> None:
        """Add the record of reading: the files and splits read, and the rows skipped."""
        self.read += reading.notes
        self.bad = reading.bad + self.bad

    def lines(self) -> list[str]:
        """Return the whole summary as plain lines: the counts, then the example."""
        return self.counts() + self.example_lines()

    def counts(self) -> list[str]:
        """Return what was read, what it became, and what was changed or dropped."""
        return self.totals() + self.read + self.template + self._changes()

    def totals(self) -> list[str]:
        """Return how many rows were read and what they became, in examples and in tokens."""
        share = self.trained_tokens / max(self.tokens, 1)
        return [
            f"{self.rows_read()} became {counted(self.examples, 'example')}",
            f"{counted(self.tokens, 'token')}, {self.trained_tokens:,} of them trained on ({share:.0%})",
        ]

    def rows_read(self) -> str:
        """Return how many rows were read, with their formats."""
        forms = ", ".join(f"{count:,} {form}" for form, count in self.formats.most_common())
        return f"{counted(self.rows, 'row')} ({forms})"

    def truncation(self) -> str:
        """Return how many rows were truncated."""
        return f"{counted(self.cut, 'row')} truncated to {self.max_length:,} tokens"

    def example_lines(self) -> list[str]:
        """Return the first example under a heading, its trained part between ⟦ and ⟧; [] if there is none."""
        if not self.example:
            return []
        shown = "".join(marked(segment) for segment in self.example)
        return ["first example, trained part between ⟦ and ⟧:", *shown.splitlines()]

    def _changes(self) -> list[str]:
        lines = []
        if self.has_chats and self.end_of_turn is None:
            lines.append("the chat template has no end-of-turn token: the model may not learn to stop")
        if self.cut:
            lines.append(self.truncation())
        if self.split:
            lines.append(f"{counted(self.split, 'text')} split into windows of {self.max_length:,} tokens")
        if self.folded_system:
            chats = counted(self.folded_system, "chat")
            lines.append(
                f"{chats}: system text moved into the user turn, as the chat template has no system turn"
            )
        if self.untrained:
            lines.append(f"{counted(self.untrained, 'answer')} with weight 0, not trained on")
        lines += [f"{counted(count, 'row')}: {what}" for what, count in self.noted.most_common()]
        if self.unused:
            names = (f"{name} ({count:,})" for name, count in self.unused.most_common())
            lines.append(f"ignored: {', '.join(names)}")
        return lines + self.losses()

    def losses(self) -> list[str]:
        """Return how many rows were dropped or skipped, and why."""
        lines = []
        if self.dropped:
            lines.append(f"{counted(len(self.dropped), 'row')} dropped: {self.reasons()}")
            lines += [f"  {where}: {reason}" for where, reason in self.dropped[:_SHOWN_DROPPED]]
        if len(self.dropped) > _SHOWN_DROPPED:
            lines.append(f"  and {len(self.dropped) - _SHOWN_DROPPED:,} more")
        if self.bad:
            lines.append(f"{self.bad_rows()}:")
            lines += [f"  {UserError(problem)}" for problem in self.bad[:_SHOWN_DROPPED]]
        if len(self.bad) > _SHOWN_DROPPED:
            lines.append(f"  and {len(self.bad) - _SHOWN_DROPPED:,} more")
        return lines

    def bad_rows(self) -> str:
        """Return how many rows were skipped because they cannot be trained on, "" if none."""
        return f"{counted(len(self.bad), 'bad row')} skipped" if self.bad else ""

    def reasons(self) -> str:
        """Return the reasons why rows were dropped, each with its count, most common first."""
        counts = Counter(reason for _, reason in self.dropped)
        return "; ".join(f"{count:,} because {reason}" for reason, count in counts.most_common())


def counted(number: int, noun: str) -> str:
    """Return "1 row", "2 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str) -> str:
    """Return the text, or its beginning and end if it is long."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} [...] {text[-half:]}"


def marked(segment: Segment) -> str:
    """Return the segment's text, shortened, between ⟦ and ⟧ if it is trained on."""
    text = shortened(segment.text)
    return f"{TRAINED_MARKS[0]}{text}{TRAINED_MARKS[1]}" if segment.is_trained else text
