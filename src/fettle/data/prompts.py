"""Prompts to answer, from a file of any type that training data may have.

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
from fettle.errors import UserError, option

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
    for name, advice in (
        ("answer", "which the output would replace: rename it"),
        ("system", f"which is not used: write it as the first of `messages`, or use {option('system')}"),
    ):
        if not is_absent(record.get(name)):
            raise UserError(f"{where}: has a column `{name}`, {advice}.")
    given = [name for name in ("prompt", *TURNS) if not is_absent(record.get(name))]
    if not given:
        columns = ", ".join(f"`{str(name)[:40]}`" for name in list(record)[:8]) or "none"
        raise UserError(
            f"{where}: has no `prompt` and no `messages` with a text in it (its columns: {columns})."
        )
    if len(given) > 1:
        raise UserError(
            f"{where}: has {' and '.join(f'`{name}`' for name in given)}; expected only one of them."
        )
    (name,) = given
    return PromptRow(_found(record[name], where, name), dict(record))


def _found(value: Any, where: str, name: str) -> str | tuple[Message, ...]:
    if name == "prompt" and isinstance(value, str):
        prompt = text(value, where, name)
        if not prompt.strip():
            raise UserError(f"{where}: `prompt` is empty; give at least one word.")
        return prompt
    if name == "prompt" and not isinstance(value, list | tuple):
        raise UserError(f"{where}: `prompt` is {kind(value)}; expected a text or a list of messages.")
    messages = turns(value, where, name)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: `{name}` does not end with a user turn, so there is nothing to answer.")
    if any(turn["role"] == "tool" or "tool_calls" in turn for turn in messages):
        raise UserError(f"{where}: `{name}` contains tool calls, which are supported in training only.")
    return messages
