"""Convert preference rows to token ids: pairs (DPO, ORPO, SimPO, reward models) and labelled answers (KTO).

Each side of a pair is rendered and tokenized as a whole, exactly as a row of supervised training is (`tokenize.py`),
with the same ids and labels.  The prompt is what comes before the first trained token, as far as both sides have the
same ids: a token that covers the end of the prompt and the beginning of an answer belongs to the answer.

Rows longer than `max_length` lose the ends of their answers, never a part of the prompt.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fettle.data.chat import Segment
from fettle.data.preference_formats import SIDES, shared_length
from fettle.data.preference_summary import LabelledSummary, PairSummary
from fettle.data.rows import LabelledRow, PreferenceRow, Row
from fettle.data.summary import Summary
from fettle.data.tokenize import NOT_TRAINED, Example, collect, examples_of, has_loss, prepare
from fettle.data.tokenizer import Tokenizer
from fettle.errors import ModelFault, UserError, reason_of


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One pair: `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids` are the two documents for the model.

    chosen_labels, rejected_labels: the ids where supervised training would train on them, else -100: what a template
    writes after the end of the answer, and the user's turns if several answers differ.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    where: str
    chosen_labels: list[int]
    rejected_labels: list[int]


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """One answer and whether it is a good one: `prompt_ids + completion_ids` is the document for the model.

    completion_labels: as `chosen_labels` in `PreferenceExample`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    is_desirable: bool
    where: str
    completion_labels: list[int]


def tokenize_preferences(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, *, max_length: int, skip_bad_rows: bool = False
) -> tuple[list[PreferenceExample], PairSummary]:
    """Return the pairs as examples whose sides have at most `max_length` tokens, and what became of the rows.

    A pair is dropped, and listed in the summary, if its prompt fills `max_length` or its answers are the same so far.
    Sets a chat template and raises `BadRows` and `NothingToTrainOn` as `tokenize_rows` does; bad are also pairs whose
    prompts differ, or whose answers are the same, once they are rendered.
    """
    summary = PairSummary(max_length, rows=len(rows), formats=Counter(row.format for row in rows))
    uses_turns = prepare([side for row in rows for side in (row.chosen, row.rejected)], tokenizer, summary)
    examples = collect(rows, lambda row: _pair(row, tokenizer, uses_turns, summary), summary, skip_bad_rows)
    summary.prompt_tokens = sum(len(example.prompt_ids) for example in examples)
    summary.chosen_tokens = sum(len(example.chosen_ids) for example in examples)
    summary.rejected_tokens = sum(len(example.rejected_ids) for example in examples)
    summary.tokens = 2 * summary.prompt_tokens + summary.chosen_tokens + summary.rejected_tokens
    summary.trained_tokens = sum(
        label != NOT_TRAINED for each in examples for label in (*each.chosen_labels, *each.rejected_labels)
    )
    return examples, summary


def tokenize_labelled(
    rows: Sequence[LabelledRow], tokenizer: Tokenizer, *, max_length: int, skip_bad_rows: bool = False
) -> tuple[list[LabelledExample], LabelledSummary]:
    """Return the labelled answers as examples of at most `max_length` tokens, and what became of the rows.

    Sets a chat template, drops rows, and raises `BadRows` and `NothingToTrainOn` as `tokenize_rows` does.
    """
    summary = LabelledSummary(max_length, rows=len(rows), formats=Counter(row.format for row in rows))
    uses_turns = prepare([row.row for row in rows], tokenizer, summary)
    examples = collect(
        rows, lambda row: _labelled(row, tokenizer, uses_turns, summary), summary, skip_bad_rows
    )
    good = [len(example.completion_ids) for example in examples if example.is_desirable]
    summary.desirable, summary.desirable_tokens = len(good), sum(good)
    summary.prompt_tokens = sum(len(example.prompt_ids) for example in examples)
    answers = sum(len(example.completion_ids) for example in examples)
    summary.undesirable_tokens = answers - summary.desirable_tokens
    summary.tokens = summary.prompt_tokens + answers
    summary.trained_tokens = sum(
        label != NOT_TRAINED for each in examples for label in each.completion_labels
    )
    return examples, summary


@dataclass(frozen=True, slots=True)
class _Whole:
    """A row as supervised training has it, but not truncated. start: the index of its first trained token."""

    example: Example
    start: int
    summary: Summary

    @property
    def prompt(self) -> str:
        return "".join(segment.text for segment in _split(self.summary.example)[0])


def _whole(row: Row, tokenizer: Tokenizer, uses_turns: bool, dropped: list[tuple[str, str]]) -> _Whole | None:
    """Return the row, tokenized; None if it was dropped."""
    summary = Summary(sys.maxsize)
    examples = examples_of(row, tokenizer, uses_turns, "assistant", summary)
    dropped += summary.dropped
    if not examples:
        return None
    (example,) = examples
    start = next(n for n, label in enumerate(example.labels) if label != NOT_TRAINED)
    return _Whole(example, start, summary)


def _shown(row: Row, tokenizer: Tokenizer, uses_turns: bool, limit: int) -> list[Segment]:
    """Return the row's segments up to where it is cut."""
    summary = Summary(limit)
    examples_of(row, tokenizer, uses_turns, "assistant", summary)
    return summary.example


def _split(segments: list[Segment]) -> tuple[list[Segment], list[Segment]]:
    """Return the segments of the prompt and of the answer."""
    start = next((n for n, segment in enumerate(segments) if segment.is_trained), len(segments))
    return segments[:start], segments[start:]


def _pair(
    row: PreferenceRow, tokenizer: Tokenizer, uses_turns: bool, summary: PairSummary
) -> list[PreferenceExample]:
    sides: list[_Whole] = []
    for name, side in zip(SIDES, (row.chosen, row.rejected), strict=True):
        try:
            whole = _whole(side, tokenizer, uses_turns, summary.dropped)
        except ModelFault:
            raise
        except UserError as error:
            raise UserError(f"`{name}`: {reason_of(error)}") from None
        if whole is None:
            return []
        sides.append(whole)
    chosen, rejected = sides
    ids, other_ids = chosen.example.input_ids, rejected.example.input_ids
    if ids == other_ids:
        raise UserError(
            "`chosen` and `rejected` have the same tokens once they are rendered; remove the row."
        )
    _require_one_prompt(chosen, rejected)
    limit = summary.max_length
    start = min(chosen.start, rejected.start, shared_length(ids, other_ids))
    if not all(has_loss(side.example.labels[:limit]) for side in sides):
        summary.dropped.append((row.where, f"its answers begin after the first {limit:,} tokens"))
        return []
    if ids[:limit] == other_ids[:limit]:
        summary.dropped.append((row.where, f"its answers are the same in the first {limit:,} tokens"))
        return []
    summary.cut += max(len(ids), len(other_ids)) > limit
    _add_notes(summary, chosen.summary, rejected.summary)
    if not summary.example:
        summary.example = _shown(row.chosen, tokenizer, uses_turns, limit)
        summary.other_answer = _split(_shown(row.rejected, tokenizer, uses_turns, limit))[1]
    return [
        PreferenceExample(
            prompt_ids=ids[:start],
            chosen_ids=ids[start:limit],
            rejected_ids=other_ids[start:limit],
            where=row.where,
            chosen_labels=chosen.example.labels[start:limit],
            rejected_labels=rejected.example.labels[start:limit],
        )
    ]


def _labelled(
    row: LabelledRow, tokenizer: Tokenizer, uses_turns: bool, summary: LabelledSummary
) -> list[LabelledExample]:
    whole = _whole(row.row, tokenizer, uses_turns, summary.dropped)
    if whole is None:
        return []
    limit, start = summary.max_length, whole.start
    if start >= limit:
        summary.dropped.append((row.where, f"its answer begins after the first {limit:,} tokens"))
        return []
    summary.cut += len(whole.example.input_ids) > limit
    _add_notes(summary, whole.summary)
    if not summary.example:
        summary.example = _shown(row.row, tokenizer, uses_turns, limit)
        summary.is_example_desirable = row.is_desirable
    return [
        LabelledExample(
            prompt_ids=whole.example.input_ids[:start],
            completion_ids=whole.example.input_ids[start:limit],
            is_desirable=row.is_desirable,
            where=row.where,
            completion_labels=whole.example.labels[start:limit],
        )
    ]


def _require_one_prompt(chosen: _Whole, rejected: _Whole) -> None:
    """Refuse sides whose rendered prompts differ; one may go on, if an answer begins with a part of the template."""
    one, other = chosen.prompt, rejected.prompt
    if not (one.startswith(other) or other.startswith(one)):
        raise UserError(
            "the prompts of `chosen` and `rejected` differ once they are rendered; make them equal, or remove the row."
        )


def _add_notes(summary: Summary, *ones: Summary) -> None:
    """Add what was noted about one row: once, though both sides have it."""
    summary.folded_system += any(one.folded_system for one in ones)
    summary.untrained += max(one.untrained for one in ones)
    summary.noted.update(dict.fromkeys((name for one in ones for name in one.noted), 1))
    for name in dict.fromkeys(name for one in ones for name in one.unused):
        summary.unused[name] += max(one.unused[name] for one in ones)
