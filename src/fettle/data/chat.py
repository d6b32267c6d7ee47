"""Render chats with the model's own template and mark the spans to train on.

A chat template is a Jinja program that turns messages into one text.  The loss covers the assistant's text and the
token that ends its turn, but the rendered text does not say where those are.  Rendering growing prefixes does not
find them either, because templates look ahead (Mistral moves the system text into the last user turn).

So each chat is rendered twice: unchanged, and with every content replaced by a unique word (a sentinel).  The second
rendering, split at the sentinels, gives the template's own pieces p0, p1, ...; the first must then equal
p0 + content + p1 + content + ... in the same order, where a content may have been stripped.  This works for any
template without changing it.

If the template writes a space before an answer but not at the end of a generation prompt (Mistral), the model has to
generate that space, so it is trained with the answer.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fettle.data.layout import (
    CALL,
    Slot,
    added_tokens,
    adds_bos,
    apply_template,
    ending,
    layout,
    pieces_around,
    require_all_turns,
    slot_text,
)
from fettle.data.tokenizer import Tokenizer
from fettle.data.tool_calls import Tool
from fettle.data.turns import Message
from fettle.errors import UserError

TrainOn = Literal["assistant", "all"]

# Zephyr's layout in plain text: it needs no special tokens besides the end-of-text token.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_OPENING_TAG = re.compile(r"\s*(<[^<>\s]+>)")
_OPENING_THOUGHT = re.compile(r"(?:<(?:think|reason|thought|scratch)\w*>|\[THINK\])\s*$")
_OPENED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?$")
_EMPTY_THOUGHT = re.compile(r"^<think>\s*</think>\s*")
_NOT_LOCATED = (
    "the model's chat template changes the text of this chat, so its turns cannot be located for the loss mask; "
    "remove the row."
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a rendered row, and whether the loss covers it."""

    text: str
    is_trained: bool


def has_own_chat_template(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer has a chat template other than the one set by `ensure_chat_template`."""
    template = tokenizer.chat_template
    return bool(template) and not (isinstance(template, str) and template.endswith(DEFAULT_CHAT_TEMPLATE))


def ensure_chat_template(tokenizer: Tokenizer) -> bool:
    """Give a tokenizer without a chat template the default one; return whether that was needed.

    The default starts with the beginning-of-text token exactly where the tokenizer itself would put one.
    """
    if tokenizer.chat_template:
        return False
    if tokenizer.eos_token is None:
        raise UserError(
            "The tokenizer has neither a chat template nor an end-of-text token, so the end of an answer "
            "cannot be marked; set `eos_token` in its tokenizer_config.json."
        )
    tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + DEFAULT_CHAT_TEMPLATE
    return True


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    completion_turns: int | None = None,
    train_on: TrainOn = "assistant",
    tools: Sequence[Tool] = (),
) -> list[Segment]:
    """Return the chat as the template renders it, split into trained and untrained segments.

    The segments concatenate to the rendered text.  Trained are the non-empty assistant turns (only those among the
    last `completion_turns` messages, if given), their reasoning if the template renders it, their calls of tools, and
    the token that ends each turn; with `train_on="all"`, everything.  Turns whose `train` is False are never trained.
    System turns that the template does not support are folded as in `fold_system`.  Raises `UserError` with the
    template's own message if it refuses the chat, and if it silently drops a turn.
    """
    messages = fold_system(tokenizer, messages, tools=tools)
    text = apply_template(tokenizer, messages, tools=tools)
    order, pieces = pieces_around(tokenizer, messages, tools=tools)
    require_all_turns(messages, order)
    spans = _answer_spans(tokenizer, text, messages, order, pieces, tools)
    first = 0 if completion_turns is None else len(messages) - completion_turns
    untrained = [span for index, span in spans.items() if not messages[index].get("train", True)]
    if train_on == "all":
        return _segments(text, untrained, is_trained=False)
    trained = [span for index, span in spans.items() if index >= first and span not in untrained]
    return _segments(text, trained, is_trained=True)


def _answer_spans(
    tokenizer: Tokenizer,
    text: str,
    messages: Sequence[Message],
    order: list[Slot],
    pieces: list[str],
    tools: Sequence[Tool],
) -> dict[int, tuple[int, int]]:
    """Return the span of each non-empty answer in the text: reasoning, words and calls, and the token that ends it."""
    tokens = added_tokens(tokenizer).values()
    template = layout(tokenizer)
    spans: dict[int, tuple[int, int]] = {}
    located = _locate(text, messages, order, pieces)
    for number, ((index, name), (start, end)) in enumerate(zip(order, located, strict=True)):
        if messages[index]["role"] != "assistant" or (index, name) in order[:number]:
            continue
        if name.startswith(CALL):
            is_first = index not in spans
            opening = _call_opening(tokenizer, messages[:index], pieces[number], tools) if is_first else ""
            if not text[:start].endswith(opening):
                raise UserError(_NOT_LOCATED)
            # Some templates write the name again before the result: that is no part of the turn.
            is_last = all(slot[0] != index or slot in order[: number + 1] for slot in order[number + 1 :])
            closing = _call_ending(pieces[number + 1], template.end_of_turn, is_last)
        else:
            opening = template.lead if name == "content" else _opening(pieces[number], template.tail)
            closing = ending(pieces[number + 1], tokens)
        start -= len(opening) if text[:start].endswith(opening) else 0
        start = min(start, spans.get(index, (start, end))[0])
        spans[index] = (start, end + len(closing))
    return spans


def _opening(before: str, tail: str) -> str:
    """Return the end of `before` that the model must generate itself: it is not part of a generation prompt."""
    if before.startswith(tail):
        return before[len(tail) :]
    tag = _OPENING_THOUGHT.search(before)
    return tag[0] if tag else ""


def _call_opening(tokenizer: Tokenizer, before: Sequence[Message], piece: str, tools: Sequence[Tool]) -> str:
    """Return what the model generates before the name of the tool it calls: what follows the generation prompt."""
    _, asked = pieces_around(tokenizer, before, for_generation=True, tools=tools)
    for prompt in (asked[-1], _OPENED_THOUGHT.sub("", asked[-1])):
        if piece.startswith(prompt):
            return _EMPTY_THOUGHT.sub("", piece[len(prompt) :])
    raise UserError(_NOT_LOCATED)


def _call_ending(after: str, end_of_turn: str | None, is_last: bool) -> str:
    """Return what follows the name of a tool, up to the token that ends the turn; that comes after the last call."""
    if end_of_turn and end_of_turn in after:
        return after[: after.index(end_of_turn) + len(end_of_turn)]
    if is_last:
        raise UserError(
            "the model's chat template does not end a call of a tool with the token that ends an answer, so its end "
            "cannot be located for the loss mask; remove the row."
        )
    return ""


def generation_prompt(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
    """Return the chat as text that ends where the assistant's answer begins.

    Tokenize it with `add_special_tokens=False`: the template has already added its special tokens.
    """
    messages = fold_system(tokenizer, messages, for_generation=True, tools=tools)
    return apply_template(tokenizer, messages, for_generation=True, tools=tools)


def end_of_turn(tokenizer: Tokenizer) -> str | None:
    """Return the token that ends an answer in this template (`<|end|>`, `</s>`), or None if none does."""
    return layout(tokenizer).end_of_turn


def fold_system(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    for_generation: bool = False,
    tools: Sequence[Tool] = (),
) -> Sequence[Message]:
    """Return the messages, with system texts moved to the start of the next user turn if necessary.

    Gemma's template refuses a system turn, and Mistral's drops it from a chat that ends with an answer; the text
    still belongs into training.  Messages that the template accepts are returned unchanged.
    """
    systems = {index for index, message in enumerate(messages) if message["role"] == "system"}
    if not systems:
        return messages
    try:
        order, _ = pieces_around(tokenizer, messages, for_generation, tools)
    except UserError:
        pass  # perhaps because of the system turn; if not, rendering the folded chat raises the same error
    else:
        if systems <= {index for index, _ in order}:
            return messages
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if message["role"] == "user" and waiting:
            message = {**message, "content": "\n\n".join([*waiting, message["content"]])}
            waiting = []
        folded.append(message)
    return messages if waiting else folded


def _locate(
    text: str, messages: Sequence[Message], order: list[Slot], pieces: list[str]
) -> list[tuple[int, int]]:
    """Return the span of each slot's content in the text, as (start, end), in the order of the pieces."""
    spans = []
    position = _shared(text, 0, pieces[0])
    is_whole = position == len(pieces[0])
    for slot, piece in zip(order, pieces[1:], strict=True):
        content = slot_text(messages, slot)
        start = position if is_whole else _before_tag(text, position, content)
        end = _content_end(text, start, content, piece)
        if end < 0:
            break
        spans.append((start, end))
        shared = _shared(text, end, piece)
        position, is_whole = end + shared, shared == len(piece)
    if len(spans) < len(order) or position != len(text):
        raise UserError(_NOT_LOCATED)
    return spans


def _content_end(text: str, start: int, content: str, piece: str) -> int:
    """Return where the content that begins at `start` ends, or -1; `piece` is what the template writes after it."""
    forms = [content, content.strip(), content.lstrip(), content.rstrip()]
    for form in forms:
        if text.startswith(form + piece, start):
            return start + len(form)
    # The piece may differ at its end, where it leads into the next content (Qwen3 opens `<think>` there).
    for form in forms:
        if form and text.startswith(form, start) and _shared(text, start + len(form), piece):
            return start + len(form)
    # The template changed the content (Qwen3 removes the reasoning of earlier turns): take whatever it left.
    return text.find(piece, start) if piece else -1


def _before_tag(text: str, position: int, content: str) -> int:
    """Step back over a tag that both the template and the answer have (`<think>`): it belongs to the answer."""
    tag = _OPENING_TAG.match(content)
    before = text[:position].rstrip()
    return len(before) - len(tag[1]) if tag and before.endswith(tag[1]) else position


def _shared(text: str, start: int, piece: str) -> int:
    """Return the length of the common prefix of the piece and the text from `start` on."""
    if text.startswith(piece, start):
        return len(piece)
    pairs = zip(text[start : start + len(piece)], piece, strict=False)
    return next((count for count, (ours, theirs) in enumerate(pairs) if ours != theirs), len(text) - start)


def _segments(text: str, spans: Iterable[tuple[int, int]], *, is_trained: bool) -> list[Segment]:
    """Split the text into segments: `spans` get `is_trained`, the text between them the opposite."""
    segments = []
    position = 0
    for start, end in sorted(spans):
        segments += [Segment(text[position:start], not is_trained), Segment(text[start:end], is_trained)]
        position = end
    segments.append(Segment(text[position:], not is_trained))
    return [segment for segment in segments if segment.text]
