"""What a chat template writes of tools and their calls, found by rendering small chats, and rows fitted to that.

Templates differ: most take the arguments of a call as an object, some as its JSON string; Mistral's requires an id of
nine letters or digits in each call.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from fettle.data.layout import apply_template
from fettle.data.rows import Row
from fettle.data.tokenizer import Tokenizer, cached
from fettle.data.turns import Message
from fettle.errors import ModelFault, UserError

_ID = "k7Qx2mB9z"
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_NAME, _KEY, _VALUE = "fettleXname", "fettleXkey", "fettleXvalue"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Says hello.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}
_ARGUMENTS: tuple[Any, ...] = ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE}))


@dataclass(frozen=True, slots=True)
class ToolLayout:
    """What one template writes. tools: the list of tools. calls: the calls of a turn, with name and arguments.

    takes_text: it takes the arguments as a JSON string. needs_ids: it refuses calls without an id of nine characters.
    """

    tools: bool
    calls: bool
    takes_text: bool = False
    needs_ids: bool = False


def tool_layout(tokenizer: Tokenizer) -> ToolLayout:
    """Return what the tokenizer's chat template writes of tools."""
    return _tool_layout(tokenizer, str(tokenizer.chat_template))


@cached
def _tool_layout(tokenizer: Tokenizer, template: str) -> ToolLayout:
    words = _rendered(tokenizer, [{"role": "user", "content": "Hello"}], [_TOOL])
    tools = _NAME in words and _KEY in words
    for needs_ids in (False, True):
        for arguments in _ARGUMENTS:
            words = _rendered(tokenizer, _chat(arguments, {"id": _ID} if needs_ids else {}), [])
            # An object written without `tojson` is Python's {'a': 'b'}; a string with it has \" inside.
            is_garbled = f"'{_KEY}'" in words or f'\\"{_KEY}' in words
            if all(word in words for word in (_NAME, _KEY, _VALUE)) and not is_garbled:
                return ToolLayout(tools, True, isinstance(arguments, str), needs_ids)
    return ToolLayout(tools, False)


def _chat(arguments: Any, ids: dict[str, str]) -> list[Message]:
    call = {**ids, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Hello", **{f"tool_call_{name}": value for name, value in ids.items()}},
        {"role": "assistant", "content": "Hello"},
    ]


def _rendered(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
    try:
        return apply_template(tokenizer, messages, tools=tools)
    except ModelFault:
        raise
    except UserError:
        return ""


def fit_tools(row: Row, tokenizer: Tokenizer) -> tuple[Row, str]:
    """Return the row with its calls as the template takes them, and what was changed that the model will see, or "".

    Raises `UserError` if the template does not write the row's tools or calls, which would then be lost.
    """
    callers = [number for number, turn in enumerate(row.messages, start=1) if "tool_calls" in turn]
    if not (row.tools or callers):
        return row, ""
    known = tool_layout(tokenizer)
    lost = "which the model's chat template does not write, so {} would be lost; "
    if row.tools and not known.tools:
        raise UserError(
            f"has a list of tools, {lost.format('it')}remove the row, or the list if the answers do not use it; "
            "or train a model whose template writes tools."
        )
    if callers and not known.calls:
        raise UserError(
            f"turn {callers[0]} calls a tool, {lost.format('the call')}remove the row, or train a model whose "
            "template writes calls."
        )
    messages = tuple(_fit_arguments(turn, known.takes_text) for turn in row.messages)
    with_ids = _with_ids(messages) if known.needs_ids else messages
    changed = "ids of tool calls, replaced by nine letters and digits as the chat template requires"
    return replace(row, messages=with_ids), changed if with_ids != messages else ""


def _fit_arguments(turn: Message, takes_text: bool) -> Message:
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = call["function"]["arguments"]
        if takes_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not takes_text and isinstance(arguments, str):
            arguments = json.loads(arguments)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**turn, "tool_calls": calls}


def _with_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with an id of nine characters in each call, and in its result.

    A result without an id answers the first call that has none yet.
    """
    fitted: list[Message] = []
    waiting: list[str] = []
    for number, turn in enumerate(messages):
        if "tool_calls" in turn:
            calls = [
                {**call, "id": _short_id(call.get("id") or f"{number} {place} {call}")}
                for place, call in enumerate(turn["tool_calls"])
            ]
            waiting = [call["id"] for call in calls]
            turn = {**turn, "tool_calls": calls}
        elif turn["role"] == "tool" and (turn.get("tool_call_id") or waiting):
            own = _short_id(turn["tool_call_id"]) if turn.get("tool_call_id") else waiting[0]
            waiting = [each for each in waiting if each != own]
            turn = {**turn, "tool_call_id": own}
        fitted.append(turn)
    return tuple(fitted)


def _short_id(given: Any) -> str:
    text = str(given)
    return text if _SHORT_ID.fullmatch(text) else sha256(text.encode()).hexdigest()[:9]
