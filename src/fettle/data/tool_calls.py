"""Tools and their calls as a row has them, converted to OpenAI's form, which chat templates take.

A tool is {type, function: {name, description, parameters}}, a call {type, function: {name, arguments}, id}. Bare
{name, ...} without `function`, and JSON strings of either, are converted. The arguments of a call stay an object or
the JSON string of one, as they were given; `tool_layout.py` converts them for the template.

In a table (parquet, or what `datasets` writes) every object has the keys of all rows, so keys without a value count as
absent. In a JSON string they are values.
"""

from __future__ import annotations

from collections.abc import Mapping
from json import JSONDecodeError
from typing import Any

from fettle.data.values import is_null, kind, listed, load_json, require_shallow
from fettle.errors import UserError

Tool = dict[str, Any]
Call = dict[str, Any]

_CALL = '{"name": ..., "arguments": {...}}'
_TOOL = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'


def tool_list(value: Any, where: str, name: str) -> tuple[Tool, ...]:
    """Return the tools in a column: a list of them, or its JSON string."""
    found = _plain(value, where, name, f"a list of {_TOOL}")
    return tuple(_tool(each, where, name) for each in (found if isinstance(found, list) else [found]))


def call_list(value: Any, where: str, name: str) -> list[Call]:
    """Return the calls in a field or turn: one or a list of them, or the JSON string of either."""
    found = _plain(value, where, name, f"{_CALL} or a list of such calls")
    calls = [_call(each, where, name) for each in (found if isinstance(found, list) else [found])]
    if not calls:
        raise UserError(f"{where}: `{name}` is empty; expected {_CALL}.")
    return calls


def _tool(value: Any, where: str, name: str) -> Tool:
    value = _plain(value, where, name, _TOOL)
    bare = _function(value, where, name, f"{_TOOL}, or the function alone")
    return {"type": "function", "function": {key: each for key, each in bare.items() if key != "type"}}


def _call(value: Any, where: str, name: str) -> Call:
    function = _function(value, where, name, _CALL)
    outer = {key: each for key, each in value.items() if key not in ("type", "function")}
    if function is value:
        outer = {"id": value["id"]} if "id" in value else {}
    if others := [key for key in function if key not in ("name", "arguments", "type", "id")]:
        raise UserError(
            f"{where}: a call in `{name}` has {listed('field', others)}; expected {_CALL}; rename or remove it."
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = arguments if arguments.strip() else "{}"
    if not isinstance(parsed := _plain(arguments, where, "arguments", "an object"), Mapping):
        raise UserError(
            f"{where}: the `arguments` of a call are {kind(parsed)}; expected an object such as "
            '{"city": "Paris"}, or the JSON string of one.'
        )
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _function(value: Any, where: str, name: str, expected: str) -> Mapping[str, Any]:
    """Return the function of a tool or call: what is under `function`, or the value itself."""
    function = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(function, Mapping):
        raise UserError(f"{where}: `{name}` contains {kind(function)}; expected {expected}.")
    if not isinstance(called := function.get("name"), str) or not called.strip():
        raise UserError(
            f"{where}: `{name}` contains {listed('field', function)} but no name; expected {expected}."
        )
    return function


def _plain(value: Any, where: str, name: str, expected: str) -> Any:
    """Return the value, parsed if it is a JSON string, otherwise without keys that have no value."""
    if not isinstance(value, str):
        require_shallow(value, where, name)
        return _without_nulls(value, where, name)
    try:
        found = load_json(value)
    except JSONDecodeError as error:
        raise UserError(
            f"{where}: `{name}` is not valid JSON ({error.msg} at character {error.pos + 1}); expected {expected}; "
            "fix it, or remove the row."
        ) from None
    require_shallow(found, where, name)
    return found


def _without_nulls(value: Any, where: str, name: str) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _without_nulls(each, where, name) for key, each in value.items() if not is_null(each)
        }
    if isinstance(value, list | tuple):
        return [_without_nulls(each, where, name) for each in value]
    if not (value is None or isinstance(value, str | bool | int | float)):
        raise UserError(
            f"{where}: `{name}` contains a value {kind(value)}, which JSON does not have; convert it."
        )
    return value
