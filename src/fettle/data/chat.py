"""Chats as the model's own template writes them, with the part to train on marked.

A chat template is a Jinja program that turns messages into one text.  The loss belongs on the assistant's
words and on the token that ends its turn, and nothing in the text says where those are.  Rendering growing
prefixes does not find them either: templates look ahead (Mistral moves the system text into the last user
turn).

So each chat is rendered twice: as it is, and with every content replaced by a unique word (a sentinel).  The
second rendering, split at the sentinels, gives the template's own pieces p0, p1, ...; the first must then
read p0 + content + p1 + content + ... in the same order, where a content may have been trimmed.  That holds
for any template without changing it.

A space that the template writes before an answer, but not at the end of a generation prompt (Mistral), is for
the model to say, and so it is trained with the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fettle.data.formats import Message
from fettle.data.template import render_template
from fettle.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Zephyr's layout in plain text: it needs no token that the vocabulary lacks.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_SENTINEL = "FETTLExCONTENTx{}x"
_SENTINELS = re.compile(r"FETTLExCONTENTx(\d+)x")
_PROBE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
_OPENING_TAG = re.compile(r"\s*(<[^<>\s]+>)")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered row, and whether the loss counts it."""

    text: str
    is_trained: bool


def has_own_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer came with a chat template (not the one set by `ensure_chat_template`)."""
    template = tokenizer.chat_template
    return bool(template) and not (isinstance(template, str) and template.endswith(DEFAULT_CHAT_TEMPLATE))


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
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
    starts_with_bos = (
        tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    )
    tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + DEFAULT_CHAT_TEMPLATE
    return True


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], completion_turns: int | None = None
) -> list[Segment]:
    """Return the chat as the template writes it, cut into trained and other segments.

    Joined, the segments are the text.  Trained are the words of the non-empty assistant turns (of the last
    `completion_turns` messages only, where given) and the token that ends each.  System turns a template has
    no place for are folded as in `fold_system`.  Raises `UserError` with the template's own words where it
    refuses the chat, and where it drops a turn silently.
    """
    messages = fold_system(tokenizer, messages)
    text = _apply(tokenizer, messages)
    order, pieces = _pieces(tokenizer, messages)
    _require_all_turns(messages, order)
    first_trained = 0 if completion_turns is None else len(messages) - completion_turns
    tokens = added_tokens(tokenizer).values()
    lead = _lead(tokenizer, str(tokenizer.chat_template))
    trained = []
    for index, piece, (start, end) in zip(
        order, pieces[1:], _locate(text, messages, order, pieces), strict=True
    ):
        if messages[index]["role"] == "assistant" and index >= first_trained:
            start -= len(lead) if text[:start].endswith(lead) else 0
            trained.append((start, end + len(_ending(piece, tokens))))
    return _segments(text, trained)


def generation_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return the chat as text that ends where the assistant begins to speak.

    Tokenise it with `add_special_tokens=False`: the template has written those it wants.
    """
    messages = fold_system(tokenizer, messages, for_generation=True)
    return _apply(tokenizer, messages, for_generation=True)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that ends an answer in this template (`<|end|>`, `</s>`), or None if none does."""
    order, pieces = _pieces(tokenizer, _PROBE)
    _require_all_turns(_PROBE, order)
    return _ending(pieces[order.index(1) + 1], added_tokens(tokenizer).values()).strip() or None


def fold_system(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_generation: bool = False
) -> Sequence[Message]:
    """Return the messages, with system texts moved to the head of the next user turn if need be.

    Gemma's template refuses a system turn, and Mistral's leaves it out of a chat that ends with an answer;
    the words are still part of the lesson.  Messages that the template takes come back unchanged.
    """
    systems = {index for index, message in enumerate(messages) if message["role"] == "system"}
    if not systems:
        return messages
    try:
        order, _ = _pieces(tokenizer, messages, for_generation)
    except UserError:
        pass  # refused: perhaps for the system turn; if for another reason, rendering the folded chat says so
    else:
        if systems <= set(order):
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


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_generation: bool = False
) -> str:
    return render_template(tokenizer, messages, for_generation=for_generation)


def _pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], for_generation: bool = False
) -> tuple[list[int], list[str]]:
    """In which order the contents come (indices of messages), and the template's text around them.

    There is one piece more than contents: they stand before, between and after.  An empty content stays
    empty: templates branch on it, and both renderings must take the same branch.
    """
    marked = [
        {**message, "content": _SENTINEL.format(index) if message["content"].strip() else message["content"]}
        for index, message in enumerate(messages)
    ]
    parts = _SENTINELS.split(_apply(tokenizer, marked, for_generation))
    return [int(index) for index in parts[1::2]], parts[0::2]


def _require_all_turns(messages: Sequence[Message], order: list[int]) -> None:
    for index, message in enumerate(messages):
        if message["content"].strip() and index not in order:
            raise UserError(
                f'turn {index + 1} (role "{message["role"]}") is left out by the model\'s chat template, '
                "which says nothing of it; remove the turn or the row."
            )


def _locate(
    text: str, messages: Sequence[Message], order: list[int], pieces: list[str]
) -> list[tuple[int, int]]:
    """Where in the text each content stands, as (start, end) in the order of the pieces."""
    spans = []
    position = _shared(text, 0, pieces[0])
    is_whole = position == len(pieces[0])
    for index, piece in zip(order, pieces[1:], strict=True):
        content = messages[index]["content"]
        start = position if is_whole else _before_tag(text, position, content)
        end = _content_end(text, start, content, piece)
        if end < 0:
            break
        spans.append((start, end))
        shared = _shared(text, end, piece)
        position, is_whole = end + shared, shared == len(piece)
    if len(spans) < len(order) or position != len(text):
        raise UserError(
            "the model's chat template rewrites this chat so that its turns cannot be found again, and what "
            "to train on is unknown; remove the row."
        )
    return spans


def _content_end(text: str, start: int, content: str, piece: str) -> int:
    """Where the content that begins at `start` ends, or -1; `piece` is what the template writes after it."""
    forms = [content, content.strip(), content.lstrip(), content.rstrip()]
    for form in forms:
        if text.startswith(form + piece, start):
            return start + len(form)
    # The piece may differ in its tail, where it leads into the next content (Qwen3 opens `<think>` there).
    for form in forms:
        if form and text.startswith(form, start) and _shared(text, start + len(form), piece):
            return start + len(form)
    # The template rewrote the words (Qwen3 removes the thoughts of earlier turns): take whatever it left.
    return text.find(piece, start) if piece else -1


def _before_tag(text: str, position: int, content: str) -> int:
    """Step back over a tag that the template and the answer share, `<think>`: it is the answer's to say."""
    tag = _OPENING_TAG.match(content)
    before = text[:position].rstrip()
    return len(before) - len(tag[1]) if tag and before.endswith(tag[1]) else position


def _shared(text: str, start: int, piece: str) -> int:
    """How many characters of the piece the text has from `start` on."""
    if text.startswith(piece, start):
        return len(piece)
    pairs = zip(text[start : start + len(piece)], piece, strict=False)
    return next((count for count, (ours, theirs) in enumerate(pairs) if ours != theirs), len(text) - start)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand outside ordinary text (role tags, end of turn) by their ids."""
    return _added_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=2)
def _added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    # Kept, because listing them takes longer than tokenising a chat; `size` notices tokens added since.
    return {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}


@lru_cache(maxsize=2)
def _lead(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The white space that `template` writes between a generation prompt and the answer, "" where none."""
    _, prompt = _pieces(tokenizer, _PROBE[:1], for_generation=True)
    _, pieces = _pieces(tokenizer, _PROBE)
    space = pieces[1].removeprefix(prompt[-1])
    return space if space.isspace() else ""


def _ending(piece: str, tokens: Iterable[str]) -> str:
    """The head of a piece up to and with the token it begins with, white space before it included, or ""."""
    bare = piece.lstrip()
    token = max((token for token in tokens if bare.startswith(token)), key=len, default="")
    return piece[: len(piece) - len(bare) + len(token)] if token else ""


def _segments(text: str, trained: list[tuple[int, int]]) -> list[Segment]:
    segments = []
    position = 0
    for start, end in sorted(trained):
        segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    segments.append(Segment(text[position:], False))
    return [segment for segment in segments if segment.text]
