"""Convert rows to token ids with labels.

A rendered row is tokenized once, as a whole: tokenizing its parts separately would give different tokens at the
boundaries than the model sees in use.  The tokenizer's offsets (the characters of each token) then map the trained
segments to tokens.  Labels equal the ids of trained tokens and are -100 elsewhere; the first token of an example is
never trained, as there is nothing to predict it from.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fettle.data.chat import (
    Segment,
    TrainOn,
    end_of_turn,
    ensure_chat_template,
    fold_system,
    has_own_chat_template,
    render,
)
from fettle.data.fit import fit, without_ends
from fettle.data.layout import added_tokens, unwritten
from fettle.data.rows import AnyRow, BadRows, Row, RowList
from fettle.data.summary import Summary
from fettle.data.tokenizer import Tokenizer
from fettle.data.turns import says_something
from fettle.errors import ModelFault, UserError, option

NOT_TRAINED = -100
Span = tuple[int, int]
Made = TypeVar("Made")


class NothingToTrainOn(UserError):
    """No row is left. bad: rows that cannot be trained on, as in the summary; the others have nothing to train on."""

    def __init__(self, message: str, bad: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.bad = list(bad)


@dataclass(frozen=True, slots=True)
class Example:
    """One document for the model: `labels[i]` is `input_ids[i]` if trained, else -100."""

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
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    skip_bad_rows: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> Tokenized:
    """Return the rows as examples of at most `max_length` tokens.

    Chats are truncated at the end, texts are split into consecutive windows; a row without a trained token left is
    dropped and listed in the summary.  If there are chats, a tokenizer without a chat template gets the default one
    (set on the tokenizer, and so saved with it).  Raises `BadRows` with all rows that the template refuses or would
    render wrongly (with `skip_bad_rows` they are skipped and listed in the summary), and `NothingToTrainOn` if no
    row remains.  advance: called with the share that is done, 0 to 1.
    """
    summary = Summary(max_length, rows=len(rows), formats=Counter(row.format for row in rows))
    uses_turns = prepare(rows, tokenizer, summary)
    examples = collect(
        rows,
        lambda row: examples_of(row, tokenizer, uses_turns, train_on, summary),
        summary,
        skip_bad_rows,
        advance,
    )
    summary.tokens = sum(len(example.input_ids) for example in examples)
    summary.trained_tokens = sum(example.trained_tokens for example in examples)
    return Tokenized(examples, summary)


def prepare(rows: Sequence[Row], tokenizer: Tokenizer, summary: Summary) -> bool:
    """Return whether prompts and completions become turns; give a tokenizer for chats a template if it has none."""
    if summary.max_length < 2:
        raise UserError(
            f"{option('max_length')} is {summary.max_length}; expected at least 2, as each token is predicted from "
            "those before it."
        )
    if not tokenizer.is_fast:
        raise UserError(
            "The tokenizer has no tokenizer.json, which is needed to map tokens to characters; add one."
        )
    uses_turns = has_own_chat_template(tokenizer)
    if any(row.messages or (uses_turns and row.prompt is not None) for row in rows):
        ensure_chat_template(tokenizer)
        summary.has_chats, summary.end_of_turn = True, end_of_turn(tokenizer)
        if not uses_turns:
            summary.template = ["the model has no chat template: chats are written in Zephyr's format"]
    return uses_turns


def collect(
    rows: Sequence[AnyRow],
    convert: Callable[[AnyRow], list[Made]],
    summary: Summary,
    skip_bad_rows: bool,
    advance: Callable[[float], None] = lambda share: None,
) -> list[Made]:
    """Return what `convert` makes of the rows. Raises `BadRows` and `NothingToTrainOn` as `tokenize_rows` does."""
    examples: list[Made] = []
    for number, row in enumerate(rows):
        advance(number / len(rows))
        try:
            examples += convert(row)
        except ModelFault:
            raise
        except UserError as error:
            summary.bad.append(f"{row.where}: {error}")
    if summary.bad and not skip_bad_rows:
        raise BadRows(summary.bad, len(rows))
    if isinstance(rows, RowList):
        summary.add_reading(rows.reading)
    if not examples:
        reasons = [reason for reason in (summary.reasons(), summary.bad_rows()) if reason]
        raise NothingToTrainOn(
            f"Nothing is left to train on: {len(summary.dropped):,} of {summary.rows:,} rows dropped, "
            f"{'; '.join(reasons) or 'there are no rows'}; fix the data or raise {option('max_length')}.",
            summary.bad,
        )
    summary.examples = len(examples)
    return examples


def examples_of(
    row: Row, tokenizer: Tokenizer, uses_turns: bool, train_on: TrainOn, summary: Summary
) -> list[Example]:
    """Return the row as examples of at most the summary's `max_length` tokens; [] if it is dropped."""
    if not row.is_trained:
        summary.dropped.append((row.where, "its weight is 0"))
        return []
    noted: Counter[str] = Counter()
    fitted = fit(row, tokenizer, uses_turns, noted)
    if fitted.messages:
        examples = _chat_examples(fitted, tokenizer, train_on, summary)
    else:
        examples = _plain_examples(fitted, tokenizer, train_on, summary)
    if examples:
        summary.noted.update(dict.fromkeys(noted, 1))
        summary.unused.update(f"column `{name}`" for name in row.unused)
    return examples


def _chat_examples(row: Row, tokenizer: Tokenizer, train_on: TrainOn, summary: Summary) -> list[Example]:
    messages = row.messages
    answers = messages if row.completion_turns is None else messages[len(messages) - row.completion_turns :]
    answers = tuple(turn for turn in answers if turn["role"] == "assistant")
    if not any(says_something(turn) for turn in answers):
        summary.dropped.append((row.where, "the assistant's turn is empty"))
        return []
    if not any(says_something(turn) and turn.get("train", True) for turn in answers):
        summary.dropped.append((row.where, "the weight of every answer is 0"))
        return []
    folded = fold_system(tokenizer, messages, tools=row.tools)
    segments = render(tokenizer, folded, row.completion_turns, train_on, row.tools)
    ids, labels, ends = _encode(tokenizer, segments, adds_special_tokens=False)
    summary.lengths[row.where] = len(ids)
    limit = summary.max_length
    if not has_loss(labels[:limit]):
        summary.dropped.append((row.where, f"its answer begins after the first {limit:,} tokens"))
        return []
    summary.folded_system += folded is not messages
    summary.cut += len(ids) > limit
    summary.untrained += sum(turn["role"] == "assistant" and not turn.get("train", True) for turn in messages)
    summary.unused.update(f"`{name}` of messages" for name in unwritten(tokenizer, folded, row.tools))
    if any(turn["role"] != "assistant" and turn.get("train") for turn in messages):
        summary.unused["`weight` or `train` of turns other than the assistant's"] += 1
    if not summary.example:
        summary.example = _clipped(segments, ends[min(limit, len(ends)) - 1])
    return [Example(ids[:limit], labels[:limit], row.where)]


def _plain_examples(row: Row, tokenizer: Tokenizer, train_on: TrainOn, summary: Summary) -> list[Example]:
    """Tokenize a text, or a prompt and completion, unchanged, adding the end-of-text token if it has no end token."""
    if row.text is not None:
        segments = [Segment(_from_bos(row.text, tokenizer), True)]
    else:
        prompt = _from_bos(row.prompt or "", tokenizer)
        segments = [Segment(prompt, train_on == "all"), Segment(row.completion or "", True)]
    if not segments[-1].text.strip():
        summary.dropped.append(
            (row.where, "its text is empty" if row.text is not None else "the completion is empty")
        )
        return []
    ids, labels, ends = _encode(tokenizer, segments, adds_special_tokens=not row.is_rendered)
    if not row.is_rendered and without_ends(segments[-1].text, tokenizer) == segments[-1].text:
        _close(tokenizer, ids, labels)
    summary.lengths[row.where] = len(ids)
    limit = summary.max_length
    windows = _windows(len(ids), limit) if row.text is not None else [(0, min(limit, len(ids)))]
    examples = [Example(ids[a:b], [NOT_TRAINED, *labels[a + 1 : b]], row.where) for a, b in windows]
    if not any(has_loss(example.labels) for example in examples):
        reason = (
            f"its completion begins after the first {limit:,} tokens"
            if len(ids) > limit
            else "it has only one token"
        )
        summary.dropped.append((row.where, reason))
        return []
    summary.split += len(windows) > 1
    summary.cut += windows[-1][1] < len(ids)
    if not summary.example:
        summary.example = _clipped(segments, ends[min(windows[0][1], len(ends)) - 1])
    return examples


def _from_bos(text: str, tokenizer: Tokenizer) -> str:
    """Return the text without white space before its own beginning-of-text token, if it has one."""
    bare = text.lstrip()
    return bare if tokenizer.bos_token and bare.startswith(tokenizer.bos_token) else text


def _close(tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> None:
    """End the document with a trained end-of-text token: the model has to learn where to stop."""
    end = tokenizer.eos_token_id
    if end is None:
        return
    if ids and ids[-1] == end:
        labels[-1] = end
    else:
        ids.append(end)
        labels.append(end)


def _encode(
    tokenizer: Tokenizer, segments: Sequence[Segment], adds_special_tokens: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return ids and labels of the concatenated segments, and the character at which each token ends."""
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
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and offsets[0][0] == offsets[0][1]:
        ids, offsets = ids[1:], offsets[1:]  # the text begins with the token, and the tokenizer added another
    is_trained = _trained(ids, offsets, _spans(segments), tokenizer)
    labels = [token if trained else NOT_TRAINED for token, trained in zip(ids, is_trained, strict=True)]
    if labels:
        labels[0] = NOT_TRAINED
    return ids, labels, [end for _, end in offsets]


def _spans(segments: Sequence[Segment]) -> list[Span]:
    """Return the trained spans of the concatenated segments, as (start, end) in characters."""
    spans = []
    position = 0
    for segment in segments:
        if segment.is_trained:
            spans.append((position, position + len(segment.text)))
        position += len(segment.text)
    return spans


def _trained(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], tokenizer: Tokenizer
) -> list[bool]:
    """Return for each token whether it is trained: whether it covers a character of a trained span.

    A token may also cover characters before the span.  An ordinary token then belongs to the answer (a prompt and its
    completion may share a word); a special token does not (Phi-3's `<|assistant|>` includes the white space after it,
    even if it belongs to the answer).
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
    """Return consecutive windows over `length` tokens; a last window of one token, with no loss, is extended to two."""
    starts = list(range(0, length, limit))
    if len(starts) > 1 and length - starts[-1] == 1 and limit > 2:
        starts[-1] -= 1
    return list(zip(starts, [*starts[1:], length], strict=True))


def has_loss(labels: Sequence[int]) -> bool:
    """Whether any token is trained on."""
    return any(label != NOT_TRAINED for label in labels)


def _clipped(segments: Sequence[Segment], end: int) -> list[Segment]:
    """Return the segments up to character `end` of their concatenated text."""
    clipped = []
    for segment in segments:
        clipped.append(Segment(segment.text[:end], segment.is_trained))
        end -= len(clipped[-1].text)
    return [segment for segment in clipped if segment.text]
