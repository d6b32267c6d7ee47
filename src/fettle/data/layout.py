"""What a chat template writes around the contents of a chat: its pieces, and the tags that mark the turns.

A template is rendered with a unique word (a sentinel) in place of each content; split at the sentinels, the
rendering gives the template's own pieces.  `layout` does so with a small chat and caches the result per template.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fettle.data.template import render_template
from fettle.data.tokenizer import Tokenizer, cached
from fettle.data.tool_calls import Tool
from fettle.data.turns import OWN, REASONING, Message
from fettle.errors import ModelFault, UserError

Slot = tuple[int, str]
"""A piece of content in a chat: the index of the message, and the name of the field, or CALL and a number."""

CALL = "call"
"""With a number, the slot of the name of the tool that a message calls."""

_SENTINEL = "FETTLExCONTENTx{}x{}x"
_SENTINELS = re.compile(r"FETTLExCONTENTx(\d+)x(\w+?)x")
_PROBE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_THOUGHT_TAG = re.compile(r"</?(?:think|reason|thought|scratch)\w*>|\[/?THINK\]")


@dataclass(frozen=True, slots=True)
class Layout:
    """How one template lays out a chat.

    bos: the beginning-of-text token if the text begins with it, or "". end_of_turn: the token that ends an answer.
    tail: what follows a question, up to the end of a generation prompt. header: the part of it that starts the answer.
    lead: white space between header and answer. tags: the tags that mark roles, without those that end a turn.
    reasoning: the message field that the template renders as the reasoning of an answer, or None.
    """

    bos: str
    end_of_turn: str | None
    tail: str
    header: str
    lead: str
    tags: frozenset[str]
    reasoning: str | None


def layout(tokenizer: Tokenizer) -> Layout:
    """Return the layout of the tokenizer's chat template. Raises `UserError` if it refuses or drops a turn."""
    return _layout(tokenizer, str(tokenizer.chat_template))


@cached
def _layout(tokenizer: Tokenizer, template: str) -> Layout:
    tokens = added_tokens(tokenizer).values()
    order, pieces = pieces_around(tokenizer, _PROBE)
    require_all_turns(_PROBE, order)
    end = ending(pieces[order.index((1, "content")) + 1], tokens).strip() or None
    _, asked = pieces_around(tokenizer, _PROBE[:1], for_generation=True)
    tail = asked[-1]
    space = pieces[1].removeprefix(tail)
    end_of_question = ending(tail, tokens)
    written = "".join(asked)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tags = {*_TAG.findall(written), *(token for token in special if token.strip() and token in written)}
    bos = tokenizer.bos_token
    return Layout(
        bos=bos if bos and pieces[0].startswith(bos) else "",
        end_of_turn=end,
        tail=tail,
        header=_THOUGHT_TAG.sub("", tail[len(end_of_question) :]).strip() or end_of_question.strip(),
        lead=space if space.isspace() else "",
        tags=frozenset(
            tag for tag in tags - {bos, tokenizer.eos_token, end} if not _THOUGHT_TAG.fullmatch(tag)
        ),
        reasoning=_reasoning_field(tokenizer),
    )


def _reasoning_field(tokenizer: Tokenizer) -> str | None:
    for name in REASONING:
        order, _ = pieces_around(tokenizer, (_PROBE[0], {**_PROBE[1], name: "Hello"}))
        if (1, name) in order:
            return name
    return None


def apply_template(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    for_generation: bool = False,
    tools: Sequence[Tool] = (),
) -> str:
    """Return the chat as the template renders it."""
    given = [{name: value for name, value in turn.items() if name not in OWN} for turn in messages]
    return render_template(tokenizer, given, for_generation=for_generation, tools=tools)


def pieces_around(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    for_generation: bool = False,
    tools: Sequence[Tool] = (),
) -> tuple[list[Slot], list[str]]:
    """Return the order of the contents in the rendered chat, and the template's text before, between and after them.

    There is one piece more than contents.  An empty content stays empty: templates branch on it, and both renderings
    must take the same branch.
    """
    marked = [_marked(index, message) for index, message in enumerate(messages)]
    parts = _SENTINELS.split(apply_template(tokenizer, marked, for_generation, tools))
    return list(zip(map(int, parts[1::3]), parts[2::3], strict=True)), parts[0::3]


def _marked(index: int, message: Message) -> Message:
    """Return the message with sentinels in place of its content and, for an answer, its reasoning and tools' names."""
    names = ["content", *(REASONING if message["role"] == "assistant" else ())]
    words = {name: message[name] for name in names if isinstance(message.get(name), str)}
    marked: Message = {name: _SENTINEL.format(index, name) for name, text in words.items() if text.strip()}
    if "tool_calls" in message:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": _SENTINEL.format(index, f"{CALL}{place}")}}
            for place, call in enumerate(message["tool_calls"])
        ]
    return {**message, **marked}


def slot_text(messages: Sequence[Message], slot: Slot) -> str:
    """Return the text that a slot has in the chat."""
    index, name = slot
    message = messages[index]
    if name.startswith(CALL):
        return str(message["tool_calls"][int(name.removeprefix(CALL))]["function"]["name"])
    return str(message[name])


def require_all_turns(messages: Sequence[Message], order: Sequence[Slot]) -> None:
    """Raise `UserError` for a turn whose content the template drops."""
    for index, message in enumerate(messages):
        if message["content"].strip() and (index, "content") not in order:
            raise UserError(
                f'turn {index + 1} (role "{message["role"]}") is silently dropped by the model\'s chat template; '
                "remove the turn or the row."
            )
        for place in range(len(message.get("tool_calls", ()))):
            if (index, f"{CALL}{place}") not in order:
                raise UserError(
                    f"turn {index + 1} calls a tool, which the model's chat template silently drops; remove the row."
                )


def unwritten(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[str]:
    """Return the names of message fields that the template does not render, once per message that has them."""
    extras = {name for message in messages for name in message} - {"role", "content", "tool_calls", *OWN}
    if not extras:
        return []
    whole = apply_template(tokenizer, messages, tools=tools)

    def is_same_without(names: set[str]) -> bool:
        fewer = [{name: value for name, value in turn.items() if name not in names} for turn in messages]
        try:
            return apply_template(tokenizer, fewer, tools=tools) == whole
        except ModelFault:
            raise
        except UserError:  # the template requires a field, such as `tool_call_id`
            return False

    lost = extras if is_same_without(extras) else {name for name in extras if is_same_without({name})}
    return [name for message in messages for name in message if name in lost]


def added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens that are not ordinary text (role tags, end of turn) by their ids."""
    return _added_tokens(tokenizer, len(tokenizer))


@cached
def _added_tokens(tokenizer: Tokenizer, size: int) -> dict[int, str]:
    # Cached, because listing them takes longer than tokenizing a chat; `size` invalidates it when tokens are added.
    return {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer itself starts a text with its beginning-of-text token."""
    bos = tokenizer.bos_token_id
    return bos is not None and bool(tokenizer("x")["input_ids"][0] == bos)


def ending(piece: str, tokens: Iterable[str]) -> str:
    """Return the token that the piece begins with, including white space before it, or ""."""
    bare = piece.lstrip()
    token = max((token for token in tokens if bare.startswith(token)), key=len, default="")
    return piece[: len(piece) - len(bare) + len(token)] if token else ""
