"""One turn of a chat, with the field names that chat templates use.

A message is a dictionary as `apply_chat_template` takes it: `role`, `content`, and any other fields of the turn, as a
template may render them (`name`, `reasoning_content`).  Fields that change the meaning and that fettle does not
support are refused here; the others are passed on, and the summary lists those that the template does not render.
A turn that calls tools has `tool_calls` (see `tool_calls.py`), and its content may be empty.

One key is fettle's own and is not passed to the template: `train`, set only if it differs from the default, which is
to train on assistant turns and on no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fettle.data.tool_calls import Call, call_list
from fettle.data.values import (
    is_absent,
    is_absent_list,
    is_null,
    kind,
    listed,
    listing,
    require_shallow,
    text,
)
from fettle.errors import UserError

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
}
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
"""Roles of turns whose content is the JSON of one call or several."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Field names for the reasoning before an answer."""
WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale")
"""Field names that say whether a turn or a row is trained on: true or false, 1 or 0."""
MASKS = ("mask", "loss_mask", "train_detail", "training_detail")
TOOL_FIELDS = ("tool_calls", "function_call")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
OWN = ("train",)
"""Keys of a message that are not passed to the template."""


def message(turn: Any, where: str) -> Message:
    """Convert one {role, content} or {from, value} to a message with a standard role name."""
    if not isinstance(turn, Mapping):
        raise UserError(f'{where}: found {kind(turn)}; expected {{"role": ..., "content": ...}}.')
    present = {str(name): value for name, value in turn.items() if not is_null(value)}
    role_key = "from" if "from" in present and "role" not in present else "role"
    content_key = _content_key(present, "value" if role_key == "from" else "content")
    calls = [name for name in TOOL_FIELDS if not is_absent_list(present.get(name))]
    for key in (role_key, *(() if calls else (content_key,))):
        if key not in present and key not in turn:
            raise UserError(
                f"{where}: found {listed('field', turn)} but no `{key}`; "
                "expected `role` and `content` (or `from` and `value`)."
            )
    role = present.get(role_key)
    _refuse_media_and_masks(present, where)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise UserError(f"{where}: unknown role {kind(role)}; known roles are {', '.join(ROLES)}.")
    made: Message = {"role": ROLES[role.lower()], "content": ""}
    if role.lower() in CALL_ROLES and not calls:
        made["tool_calls"] = call_list(turn[content_key], where, content_key)
    elif content_key in present or not calls:
        made["content"] = _content(turn[content_key], where, content_key)
    if calls:
        made["tool_calls"] = _calls(present, calls, made["role"], where)
    is_trained = trained(present, where)
    if is_trained is not None and is_trained != (made["role"] == "assistant"):
        made["train"] = is_trained
    for name, value in present.items():
        is_known = name in (role_key, content_key, *TOOL_FIELDS, *made) or is_weight(name, value)
        if not is_known and not is_absent(value):
            require_shallow(value, where, name)
            made[name] = value
    return with_one_reasoning(made, where)


def is_weight(name: str, value: Any) -> bool:
    """Whether a field says if its turn or row is trained on.

    Some tools store a measured loss as `loss`: a number there other than 0 and 1 is metadata.
    """
    return name in WEIGHTS and (name != "loss" or _number(value) in (None, 0, 1))


def trained(fields: Mapping[str, Any], where: str) -> bool | None:
    """Return the value of `weight`, `train` and the like: True, False, or None if there is none of them.

    The strings 0, 1, true and false count as values, since all cells of a CSV are strings.
    """
    said: dict[str, bool] = {}
    for name in WEIGHTS:
        value = fields.get(name)
        if is_absent(value) or not is_weight(name, value):
            continue
        number = _number(value)
        if number not in (0, 1):
            raise UserError(f"{where}: `{name}` is {kind(value)}; expected 0 or 1 (or false or true).")
        said[name] = bool(number)
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(f'`{name}`' for name in said)} contradict each other.")
    return next(iter(said.values()), None)


def _number(value: Any) -> float | None:
    """Return the value as a number or boolean, parsed from a string if necessary; None if it is neither."""
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float) else None
    bare = value.strip().lower()
    if bare in ("true", "false"):
        return bare == "true"
    try:
        return float(bare)
    except ValueError:
        return None


def reasoning_of(turn: Message) -> str | None:
    """Return the name of the field with the reasoning of an answer, if any."""
    if turn["role"] != "assistant":
        return None
    return next((name for name in REASONING if name in turn), None)


def _content_key(present: Mapping[str, Any], usual: str) -> str:
    """Return `content` or `value`: the one that is not empty, or else the usual one."""
    other = "content" if usual == "value" else "value"
    if is_absent(present.get(usual)) and not is_absent(present.get(other)):
        return other
    return usual if usual in present or other not in present else other


def says_something(turn: Message) -> bool:
    """Whether a turn has any text or calls a tool."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _calls(present: Mapping[str, Any], names: Sequence[str], role: str, where: str) -> list[Call]:
    if role != "assistant":
        raise UserError(
            f"{where}: has `{names[0]}` in a turn of the {role}; expected it in turns of the assistant only."
        )
    if len(names) > 1:
        raise UserError(f"{where}: has {' and '.join(f'`{name}`' for name in names)}; keep one of them.")
    return call_list(present[names[0]], where, names[0])


def _refuse_media_and_masks(present: Mapping[str, Any], where: str) -> None:
    """Refuse fields that affect the loss or the text of a turn in ways that fettle does not support."""
    for name in (*MEDIA, *MASKS):
        if not is_absent_list(present.get(name)):
            reason = (
                "but fettle trains on text only; remove this row"
                if name in MEDIA
                else "which masks parts of a turn and is not supported; "
                "use `weight` 0 or 1 for whole turns, or remove it"
            )
            raise UserError(f"{where}: has `{name}`, {reason}.")


def _content(value: Any, where: str, name: str) -> str:
    """Return the content as one string, from a string or a list of {"type": "text", "text": ...} parts."""
    if not isinstance(value, list | tuple):
        return text(value, where, name)
    words = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            found = f"a part of type {kind(part.get('type'))}" if isinstance(part, Mapping) else kind(part)
            raise UserError(f"{where}: `{name}` contains {found}; expected text parts only; remove this row.")
        others = [name for name, each in part.items() if name not in ("type", "text") and not is_absent(each)]
        if others:
            raise UserError(
                f"{where}: a text part of `{name}` also has {listed('field', others)}, which would be lost; "
                "remove it, or the row."
            )
        words.append(text(part.get("text"), where, name))
    return "".join(words)


def with_one_reasoning(made: Message, where: str) -> Message:
    """Return the message with its reasoning under one name only; `UserError` if the names have different texts."""
    names = [name for name in REASONING if name in made] if made["role"] == "assistant" else []
    for name in names:
        text(made[name], where, name)
    if len({made[name] for name in names}) > 1:
        found = " and ".join(f"`{name}`" for name in names)
        raise UserError(f"{where}: has {found} with different text; keep one of them.")
    return {name: value for name, value in made.items() if name not in names[1:]}


def turns(value: Any, where: str, column: str, role_of_text: str = "") -> tuple[Message, ...]:
    """Return the messages in a cell; a plain string is one message with `role_of_text`, if that is given."""
    if role_of_text and isinstance(value, str):
        return ({"role": role_of_text, "content": text(value, where, column)},)
    found = listing(value, where, column)
    if not found:
        raise UserError(f"{where}: `{column}` is empty; expected at least one user and one assistant turn.")
    messages = (message(turn, f"{where}, turn {number}") for number, turn in enumerate(found, start=1))
    # An empty system turn has no meaning, and templates differ in how they render it, so it is left out.
    return tuple(m for m in messages if m["role"] != "system" or m["content"].strip())
