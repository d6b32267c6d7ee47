"""The forms a training row can take, recognised by its columns.

Five forms are in common use, and a row is one of them by the columns it has:

| form                | columns                                                                |
|---------------------|------------------------------------------------------------------------|
| messages            | `messages`: a list of {role, content} (OpenAI's form)                  |
| ShareGPT            | `conversations`: a list of {from, value}; optional `system`            |
| Alpaca              | `instruction`, `output`; optional `input`, `system`, `history`         |
| prompt / completion | `prompt`, `completion`: texts, or lists of messages                    |
| text                | `text`                                                                 |

A column that holds null counts as absent, so one table may mix forms row by row.  What would be trained
wrongly is refused in one sentence rather than guessed at: preference pairs (a supervised loss would teach the
rejected answers as well), tool calls, numbers where words belong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fettle.errors import UserError

Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
TOOL_ROLES = {"tool", "function", "function_call", "observation", "tool_call", "tool_response", "ipython"}
EXPECTED = "messages, conversations, instruction + output, prompt + completion, or text"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of training data: a chat (`messages`), a `prompt` with its `completion`, or plain `text`.

    where: the file and line it came from, as error messages name it.
    form: the form it was written in, as the table above names it.
    completion_turns: where set, only that many of the last messages are trained on, not earlier answers.
    """

    where: str
    form: str
    messages: tuple[Message, ...] = ()
    completion_turns: int | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


def to_row(record: Any, where: str) -> Row:
    """Return the record of a file as a `Row`; raise `UserError` naming `where` if it is no known form."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {_kind(record)}; expected an object with named columns: {EXPECTED}.")
    present = {name: value for name, value in record.items() if value is not None}
    _refuse_preferences(present, where)
    _refuse_tools(present, where)
    for columns, convert in _FORMS:
        if all(column in present for column in columns):
            return convert(present, where)
    nulls = [str(name) for name in record if name not in present]
    raise UserError(
        f"{where}: found {_listed('column', list(present))}"
        + (f" and nothing (null) in {', '.join(nulls)}" if nulls else "")
        + f"; expected {EXPECTED}; rename the columns or fill in the missing one."
    )


def _refuse_preferences(record: Mapping[str, Any], where: str) -> None:
    """Refuse rows made for DPO (chosen/rejected) or KTO (an answer and a true/false label)."""
    pair = [name for name in ("chosen", "rejected") if name in record]
    is_answer = any(name in record for name in ("messages", "conversations", "completion"))
    label = record.get("label")
    is_labelled = isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false"))
    if not pair and not (is_answer and is_labelled):
        return
    found = " and ".join(f"`{name}`" for name in pair) or "a true/false `label`"
    raise UserError(
        f"{where}: has {found}, which is preference data; supervised training would learn the rejected "
        "answers too, so keep only the good answers, as `messages` or `prompt` and `completion`."
    )


def _refuse_tools(record: Mapping[str, Any], where: str) -> None:
    tools = record.get("tools")
    if tools and tools not in ("[]", "null", "{}"):
        raise UserError(
            f"{where}: has `tools`, and training on tool calls is not supported; leave these rows out, "
            "or remove the `tools` column if the answers do not use them."
        )


def _from_messages(record: Mapping[str, Any], where: str) -> Row:
    return Row(where, "messages", messages=_chat(record["messages"], where, "messages"))


def _from_sharegpt(record: Mapping[str, Any], where: str) -> Row:
    turns = _chat(record["conversations"], where, "conversations")
    return Row(where, "ShareGPT", messages=_system(record, where) + turns)


def _from_alpaca(record: Mapping[str, Any], where: str) -> Row:
    request = _text(record["instruction"], where, "instruction")
    extra = _text(record.get("input", ""), where, "input")
    messages = list(_system(record, where))
    for pair in _listing(record.get("history", []), where, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"{where}: `history` holds {_kind(pair)}; expected pairs of [request, answer], both text."
            )
        messages += _turn_pair(*(_text(words, where, "history") for words in pair))
    request = "\n\n".join(part for part in (request, extra) if part.strip())
    messages += _turn_pair(request, _text(record["output"], where, "output"))
    return Row(where, "Alpaca", messages=tuple(messages))


def _from_prompt(record: Mapping[str, Any], where: str) -> Row:
    prompt = _parsed(record["prompt"], where, "prompt")
    completion = _parsed(record["completion"], where, "completion")
    form = "prompt / completion"
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = _text(prompt, where, "prompt"), _text(completion, where, "completion")
        return Row(where, form, prompt=prompt, completion=completion)
    context = _turns(prompt, where, "prompt", role_of_text="user")
    answer = _turns(completion, where, "completion", role_of_text="assistant")
    _require_assistant(answer, where)
    return Row(where, form, messages=context + answer, completion_turns=len(answer))


def _from_text(record: Mapping[str, Any], where: str) -> Row:
    return Row(where, "text", text=_text(record["text"], where, "text"))


# The first form whose columns are all there is taken: a table that keeps a `text` or `prompt` column beside
# the chat it came from is a chat.
_FORMS: list[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Row]]] = [
    (("messages",), _from_messages),
    (("conversations",), _from_sharegpt),
    (("instruction", "output"), _from_alpaca),
    (("prompt", "completion"), _from_prompt),
    (("text",), _from_text),
]


def _chat(value: Any, where: str, column: str) -> tuple[Message, ...]:
    messages = _turns(value, where, column)
    _require_assistant(messages, where)
    return messages


def _turns(value: Any, where: str, column: str, role_of_text: str = "") -> tuple[Message, ...]:
    """The messages in a cell; a plain text is one message of `role_of_text` where that is given."""
    if role_of_text and isinstance(value, str):
        return ({"role": role_of_text, "content": _text(value, where, column)},)
    turns = _listing(value, where, column)
    if not turns:
        raise UserError(f"{where}: `{column}` is empty; expected at least one user and one assistant turn.")
    messages = (_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1))
    # An empty system turn says nothing; templates differ in how they write it, so it is left out.
    return tuple(m for m in messages if m["role"] != "system" or m["content"].strip())


def _message(turn: Any, where: str) -> Message:
    """One {role, content} or {from, value} as {role, content} with the role in its common name."""
    if not isinstance(turn, Mapping):
        raise UserError(f'{where}: found {_kind(turn)}; expected {{"role": ..., "content": ...}}.')
    keys = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    missing = " or ".join(f"`{key}`" for key in keys if key not in turn)
    if missing:
        raise UserError(
            f"{where}: found {_listed('field', list(turn))} but no {missing}; "
            "expected `role` and `content` (or `from` and `value`)."
        )
    role = turn[keys[0]]
    if turn.get("tool_calls") or (isinstance(role, str) and role.lower() in TOOL_ROLES):
        found = "`tool_calls`" if turn.get("tool_calls") else f'role "{role}"'
        raise UserError(
            f"{where}: has {found}, and training on tool calls is not supported; leave this row out."
        )
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UserError(f"{where}: unknown role {_kind(role)}; known roles are {', '.join(ROLES)}.")
    return {"role": ROLES[role.lower()], "content": _content(turn[keys[1]], where, keys[1])}


def _content(value: Any, where: str, name: str) -> str:
    """Text, or a list of {"type": "text", "text": ...} parts joined to one text."""
    if not isinstance(value, list):
        return _text(value, where, name)
    words = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = f'a part of type "{part.get("type")}"' if isinstance(part, Mapping) else _kind(part)
            raise UserError(
                f"{where}: `{name}` holds {found}; expected text parts only, or leave this row out."
            )
        words.append(_text(part.get("text"), where, name))
    return "".join(words)


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, int | float) else ""
        raise UserError(f"{where}: `{name}` is {_kind(value)}; expected text{hint}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: `{name}` holds half a character (a lone surrogate) at position {error.start}; "
            "remove it."
        ) from None
    return value


def _parsed(value: Any, where: str, name: str, opening: str = "[{") -> Any:
    """The value, read as JSON if it is text with that opening: so the plain cells of a CSV can hold chats."""
    if not (isinstance(value, str) and value.lstrip().startswith(opening)):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: `{name}` is not valid JSON ({error.msg} at character {error.pos + 1}); "
            'write it as [{"role": "user", "content": "..."}, ...] with double quotes.'
        ) from None


def _listing(value: Any, where: str, name: str) -> list[Any]:
    if value == "":  # an empty cell of a table
        return []
    value = _parsed(value, where, name, opening="[")
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: `{name}` is {_kind(value)}; expected a list.")
    return list(value)


def _system(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    text = _text(record.get("system", ""), where, "system")
    return ({"role": "system", "content": text},) if text.strip() else ()


def _turn_pair(request: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _require_assistant(messages: tuple[Message, ...], where: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}: has no assistant turn, so there is nothing to learn from; "
            "add an answer or remove the row."
        )


def _listed(noun: str, names: list[Any]) -> str:
    if not names:
        return f"no {noun}s"
    return f"{noun}{'s' if len(names) > 1 else ''} {', '.join(str(name) for name in names)}"


def _kind(value: Any) -> str:
    """What a value is, in words a person uses."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{value[:40]}"'
    if isinstance(value, bool | int | float):
        return f"the {'value' if isinstance(value, bool) else 'number'} {json.dumps(value)}"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}"
