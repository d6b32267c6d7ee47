"""Rows to token ids with labels: what the model reads, and which of it the loss counts.

A rendered row is tokenised once, whole: tokenising its parts one by one would give other tokens at the seams
than the model meets in use.  The tokenizer's offsets (which characters each token stands for) then carry the
trained segments over to tokens.  Labels equal the ids where trained and are -100 elsewhere; the first token
of an example is never trained, for nothing precedes it to predict it from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fettle.data.chat import (
    Segment,
    added_tokens,
    end_of_turn,
    ensure_chat_template,
    fold_system,
    has_own_chat_template,
    render,
)
from fettle.data.formats import Message, Row
from fettle.data.summary import Summary
from fettle.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_TRAINED = -100
TrainOn = Literal["assistant", "all"]
Span = tuple[int, int]


class NothingToTrainOn(UserError):
    """Every row was dropped; no row was at fault alone."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document for the model: `labels[i]` is `input_ids[i]` where trained, else -100."""

    input_ids: list[int]
    labels: list[int]
    where: str

    @property
    def trained_tokens(self) -> int:
        return sum(label != NOT_TRAINED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The examples in the order of their rows, and what became of the rows."""

    examples: list[Example]
    summary: Summary


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
) -> Tokenized:
    """Return the rows as examples of at most `max_length` tokens.

    Chats are cut at the end, texts are split into consecutive windows; a row of which nothing trained
    remains is dropped and named in the summary.  A tokenizer without a chat template gets the default one if
    there are chats (it is set on the tokenizer, and so saved with it).  Raises `UserError` naming the row a
    template refuses, and `NothingToTrainOn` when no row at all remains.
    """
    if max_length < 2:
        raise UserError(
            f"max_length is {max_length}; expected at least 2, for a token is predicted from another."
        )
    if not tokenizer.is_fast:
        raise UserError(
            "The tokenizer has no tokenizer.json, which marks where tokens lie in the text; add one."
        )
    summary = Summary(max_length, rows=len(rows), forms=Counter(row.form for row in rows))
    uses_turns = has_own_chat_template(tokenizer)
    chats = [_messages(row, uses_turns) for row in rows]
    if any(chats):
        ensure_chat_template(tokenizer)
        summary.has_chats, summary.end_of_turn = True, end_of_turn(tokenizer)
    examples: list[Example] = []
    for row, messages in zip(rows, chats, strict=True):
        try:
            if messages:
                examples += _chat_examples(row, messages, tokenizer, train_on, summary)
            else:
                examples += _plain_examples(row, tokenizer, train_on, summary)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    _count(examples, summary)
    return Tokenized(examples, summary)


def _count(examples: list[Example], summary: Summary) -> None:
    if not examples:
        reasons = summary.reasons() or "there are no rows"
        raise NothingToTrainOn(
            f"Nothing is left to train on: {len(summary.dropped):,} of {summary.rows:,} rows dropped, "
            f"{reasons}; mend the data or raise max_length."
        )
    summary.examples = len(examples)
    summary.tokens = sum(len(example.input_ids) for example in examples)
    summary.trained_tokens = sum(example.trained_tokens for example in examples)


def _messages(row: Row, uses_turns: bool) -> tuple[Message, ...]:
    """The row as a chat, or () if it is to be read as plain text."""
    if row.messages or not uses_turns or row.prompt is None or row.completion is None:
        return row.messages
    return ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion})


def _chat_examples(
    row: Row,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn,
    summary: Summary,
) -> list[Example]:
    answers = messages if row.completion_turns is None else messages[len(messages) - row.completion_turns :]
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in answers):
        summary.dropped.append((row.where, "the assistant's turn is empty"))
        return []
    fitted = fold_system(tokenizer, messages)
    segments = render(tokenizer, fitted, row.completion_turns)
    if train_on == "all":
        segments = [Segment(segment.text, True) for segment in segments]
    ids, labels, ends = _encode(tokenizer, segments, adds_special_tokens=False)
    limit = summary.max_length
    if not _has_loss(labels[:limit]):
        summary.dropped.append((row.where, f"its answer begins after the first {limit:,} tokens"))
        return []
    summary.folded_system += fitted is not messages
    summary.cut += len(ids) > limit
    if not summary.example:
        summary.example = _clipped(segments, ends[min(limit, len(ends)) - 1])
    return [Example(ids[:limit], labels[:limit], row.where)]


def _plain_examples(
    row: Row, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, summary: Summary
) -> list[Example]:
    """A text, or a prompt and completion for a model without turns: as it is, and the end-of-text token."""
    if row.text is not None:
        segments = [Segment(row.text, True)]
    else:
        segments = [Segment(row.prompt or "", train_on == "all"), Segment(row.completion or "", True)]
    if not segments[-1].text.strip():
        summary.dropped.append(
            (row.where, "its text is empty" if row.text is not None else "the completion is empty")
        )
        return []
    ids, labels, ends = _encode(tokenizer, segments, adds_special_tokens=True)
    _close(tokenizer, ids, labels)
    limit = summary.max_length
    windows = _windows(len(ids), limit) if row.text is not None else [(0, min(limit, len(ids)))]
    examples = [Example(ids[a:b], [NOT_TRAINED, *labels[a + 1 : b]], row.where) for a, b in windows]
    if not any(_has_loss(example.labels) for example in examples):
        reason = (
            f"its completion begins after the first {limit:,} tokens"
            if len(ids) > limit
            else "it is one token"
        )
        summary.dropped.append((row.where, reason))
        return []
    summary.split += len(windows) > 1
    summary.cut += windows[-1][1] < len(ids)
    if not summary.example:
        summary.example = _clipped(segments, ends[min(windows[0][1], len(ends)) - 1])
    return examples


def _close(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> None:
    """End the document with the end-of-text token, trained: the model has to learn where to stop."""
    end = tokenizer.eos_token_id
    if end is None:
        return
    if ids and ids[-1] == end:
        labels[-1] = end
    else:
        ids.append(end)
        labels.append(end)


def _encode(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment], adds_special_tokens: bool
) -> tuple[list[int], list[int], list[int]]:
    """The ids and labels of the joined segments, and the character at which each token ends."""
    text = "".join(segment.text for segment in segments)
    encoded = tokenizer(
        text,
        add_special_tokens=adds_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[int] = encoded["input_ids"]
    offsets: list[Span] = encoded["offset_mapping"]
    is_trained = _trained(ids, offsets, _spans(segments), tokenizer)
    labels = [token if trained else NOT_TRAINED for token, trained in zip(ids, is_trained, strict=True)]
    if labels:
        labels[0] = NOT_TRAINED
    return ids, labels, [end for _, end in offsets]


def _spans(segments: Sequence[Segment]) -> list[Span]:
    """The characters of the joined segments that are trained, as (start, end)."""
    spans = []
    position = 0
    for segment in segments:
        if segment.is_trained:
            spans.append((position, position + len(segment.text)))
        position += len(segment.text)
    return spans


def _trained(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Whether each token is trained: it holds a character of a trained span.

    A token may hold characters before the span too.  An ordinary one belongs to the answer (a prompt and its
    completion may share a word); one of the template's own does not (Phi-3's `<|assistant|>` swallows the
    white space after it, the answer's as well).
    """
    flags = []
    waiting = list(reversed(spans))
    for token, (start, end) in zip(ids, offsets, strict=True):
        while waiting and waiting[-1][1] <= start:
            waiting.pop()
        is_inside = bool(waiting) and end > waiting[-1][0]
        if is_inside and start < waiting[-1][0]:
            is_inside = token not in added_tokens(tokenizer)
        flags.append(is_inside)
    return flags


def _windows(length: int, limit: int) -> list[Span]:
    """Consecutive windows over `length` tokens; a last one of a single token, training nothing, gets two."""
    starts = list(range(0, length, limit))
    if len(starts) > 1 and length - starts[-1] == 1 and limit > 2:
        starts[-1] -= 1
    return list(zip(starts, [*starts[1:], length], strict=True))


def _has_loss(labels: Sequence[int]) -> bool:
    return any(label != NOT_TRAINED for label in labels)


def _clipped(segments: Sequence[Segment], end: int) -> list[Segment]:
    """The segments up to character `end` of their joined text."""
    clipped = []
    for segment in segments:
        clipped.append(Segment(segment.text[:end], segment.is_trained))
        end -= len(clipped[-1].text)
    return [segment for segment in clipped if segment.text]
