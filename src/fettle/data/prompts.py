"""Prompts to answer, from a file in any of the formats of training data.

A row has a `prompt`, or `messages` (or `conversations`) that end with the user's turn. Other columns are kept for the
answers' file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fettle.data.read import records
from fettle.data.rows import BadRows
from fettle.data.turns import Message, turns
from fettle.data.values import is_absent, kind, text
from fettle.errors import UserError

TURNS = ("messages", "conversations")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt and the row that it comes from."""

    prompt: str | tuple[Message, ...]
    row: dict[str, Any]


def read_prompts(source: str | Path) -> list[PromptRow]:
    """Return the prompts of a file. Raises UserError for a file that cannot be read, BadRows for rows without one."""
    rows, problems, total = [], [], 0
    for record, where in records(source):
        total += 1
        try:
            rows.append(_prompt(record, where))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise BadRows(problems, total)
    return rows


def _prompt(record: Any, where: str) -> PromptRow:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: is {kind(record)}; expected an object with `prompt` or `messages`.")
    given = [name for name in ("prompt", *TURNS) if not is_absent(record.get(name))]
    if len(given) != 1:
        found = " and ".join(f"`{name}`" for name in given) or "neither"
        raise UserError(f"{where}: has {found}; expected either `prompt` or `messages`.")
    (name,) = given
    return PromptRow(_found(record[name], where, name), dict(record))


def _found(value: Any, where: str, name: str) -> str | tuple[Message, ...]:
    if name == "prompt" and isinstance(value, str):
        prompt = text(value, where, name)
        if not prompt.strip():
            raise UserError(f"{where}: `prompt` is empty; give at least one word.")
        return prompt
    messages = turns(value, where, name)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: `{name}` does not end with a user turn, so there is nothing to answer.")
    return messages
