"""The values of a row's columns: what counts as absent, what is text, and how error messages describe a value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fettle.errors import UserError

_DEEPEST = 32  # levels of nested lists and objects; real rows have a handful
_SHOWN_NAMES = 10


class NotText(UserError):
    """A number in a text column. How to fix it depends on the file type, which the reader knows."""


def is_null(value: Any) -> bool:
    """Whether the value is null, or the NaN that pandas writes for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_absent(value: Any, depth: int = 0) -> bool:
    """Whether a value is empty: null, NaN, blank text, or a list or object with nothing else in it.

    A table that mixes row formats has every column and field in every row; unused ones are empty in this sense.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping | list | tuple):
        values = value.values() if isinstance(value, Mapping) else value
        return depth < _DEEPEST and all(is_absent(each, depth + 1) for each in values)
    return is_null(value)


def is_absent_list(value: Any) -> bool:
    """`is_absent` for a column of lists, which are JSON strings in a CSV cell."""
    return is_absent(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null", "None"))


def require_shallow(value: Any, where: str, name: str, depth: int = 0) -> None:
    """Refuse a value that is nested too deeply to be handled safely, or contains a lone surrogate."""
    if depth > _DEEPEST:
        raise UserError(f"{where}: `{name}` is nested more than {_DEEPEST} levels deep; remove it.")
    if isinstance(value, str):
        text(value, where, name)
    elif isinstance(value, Mapping | list | tuple):
        for each in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            require_shallow(each, where, name, depth + 1)


def text(value: Any, where: str, name: str) -> str:
    """Return the value if it is a string that can be encoded; raises `UserError` otherwise."""
    if not isinstance(value, str):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not is_null(value)
        raise (NotText if is_number else UserError)(f"{where}: `{name}` is {kind(value)}; expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: `{name}` contains a lone surrogate (half a character) at position {error.start}; "
            "remove it."
        ) from None
    return value


class _Doubled(Exception):
    """A key that an object has twice: Python would keep the last value without a word."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Doubled(next(name for name in names if names.count(name) > 1))
    return found


def load_json(content: str) -> Any:
    """Like `json.loads`, but every failure is a `JSONDecodeError`."""
    try:
        return json.loads(content, object_pairs_hook=_once)
    except _Doubled as error:
        raise json.JSONDecodeError(f"the key {error.args[0]!r} is there twice", content, 0) from None
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", content, 0) from None
    except ValueError:  # Python's limit on the digits of an int
        raise json.JSONDecodeError("a number has more than 4,300 digits", content, 0) from None


def parsed(value: Any, where: str, name: str, opening: str = "[{") -> Any:
    """Return the value, parsed as JSON if it is a string with that opening, so that CSV cells can contain chats."""
    if not (isinstance(value, str) and value.lstrip().startswith(opening)):
        return value
    try:
        return load_json(value)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: `{name}` is not valid JSON ({error.msg} at character {error.pos + 1}); "
            'write it as [{"role": "user", "content": "..."}, ...] with double quotes.'
        ) from None


def listing(value: Any, where: str, name: str) -> list[Any]:
    """Return the value as a list; a blank cell is an empty list."""
    if is_null(value) or (isinstance(value, str) and is_absent_list(value)):
        return []
    value = parsed(value, where, name, opening="[")
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: `{name}` is {kind(value)}; expected a list.")
    return list(value)


def listed(noun: str, names: Iterable[Any]) -> str:
    """Return the names after their noun: "columns a, b", "no columns"."""
    shown = [printable(str(name)) for name in names]
    if not shown:
        return f"no {noun}s"
    more = f" and {len(shown) - _SHOWN_NAMES} more" if len(shown) > _SHOWN_NAMES else ""
    return f"{noun}{'s' if len(shown) > 1 else ''} {', '.join(shown[:_SHOWN_NAMES])}{more}"


def kind(value: Any) -> str:
    """Describe a value for an error message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return f'"{printable(value)}"'
    if isinstance(value, bool | int | float):
        return f"the {'value' if isinstance(value, bool) else 'number'} {json.dumps(value)[:40]}"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"of type {type(value).__name__}"


def printable(name: str) -> str:
    """Return the first 40 characters, with what UTF-8 cannot encode written as an escape."""
    return name[:40].encode("utf-8", "backslashreplace").decode("utf-8")
