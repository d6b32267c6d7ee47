"""How preference data was read: the counts of `Summary`, and one row with the answers that are compared."""

from dataclasses import dataclass, field

from fettle.data.chat import Segment
from fettle.data.summary import Summary, counted, marked


@dataclass(slots=True)
class PairSummary(Summary):
    """Counts over pairs.

    tokens / trained_tokens: of both sides, so that the prompt counts twice. prompt_tokens, chosen_tokens and
    rejected_tokens: with the prompt once. cut: pairs with an answer that was truncated. example: the prompt and the
    chosen answer of the first pair; other_answer: its rejected answer.
    """

    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    other_answer: list[Segment] = field(default_factory=list)

    def totals(self) -> list[str]:
        """Return how many rows were read, and the tokens of the pairs."""
        return [
            f"{self.rows_read()} became {counted(self.examples, 'pair')}",
            f"{counted(self.prompt_tokens, 'token')} in prompts, {self.chosen_tokens:,} in chosen answers, "
            f"{self.rejected_tokens:,} in rejected answers",
        ]

    def truncation(self) -> str:
        """Return how many pairs have an answer that was truncated."""
        return _truncation(self, "pair")

    def example_lines(self) -> list[str]:
        """Return the first pair under a heading: the prompt and the chosen answer, then the rejected answer."""
        if not self.example:
            return []
        return [
            "first pair: the prompt and, between ⟦ and ⟧, the chosen answer:",
            *_shown(self.example),
            "the rejected answer:",
            *_shown(self.other_answer),
        ]


@dataclass(slots=True)
class LabelledSummary(Summary):
    """Counts over labelled answers: how many are desirable and undesirable, and their tokens."""

    desirable: int = 0
    prompt_tokens: int = 0
    desirable_tokens: int = 0
    undesirable_tokens: int = 0
    is_example_desirable: bool = False

    @property
    def undesirable(self) -> int:
        return self.examples - self.desirable

    def totals(self) -> list[str]:
        """Return how many rows were read, and the answers and their tokens by label."""
        lines = [
            f"{self.rows_read()} became {counted(self.desirable, 'desirable answer')} and "
            f"{self.undesirable:,} undesirable",
            f"{counted(self.prompt_tokens, 'token')} in prompts, {self.desirable_tokens:,} in desirable answers, "
            f"{self.undesirable_tokens:,} in undesirable answers",
        ]
        if not (self.desirable and self.undesirable):
            missing = "undesirable" if self.desirable else "desirable"
            lines.append(f"no answer is {missing}: there is nothing to compare the others with")
        return lines

    def truncation(self) -> str:
        """Return how many answers were truncated."""
        return _truncation(self, "row")

    def example_lines(self) -> list[str]:
        """Return the first answer after its prompt, under a heading with its label."""
        if not self.example:
            return []
        label = "desirable" if self.is_example_desirable else "undesirable"
        return [
            f"first row: the prompt and, between ⟦ and ⟧, its {label} answer:",
            *_shown(self.example),
        ]


def _truncation(summary: Summary, noun: str) -> str:
    return f"{counted(summary.cut, noun)}: answers cut at the end, to {summary.max_length:,} tokens with the prompt"


def _shown(segments: list[Segment]) -> list[str]:
    return "".join(marked(segment) for segment in segments).splitlines()
