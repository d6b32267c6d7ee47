r"""The formats of preference rows, detected from the columns.

A pair has the columns `chosen` and `rejected`, two answers to one question.  Each is a text, one turn, or a list of
turns.  The question is found in one of these places:

| place                             | as written by                                                      |
|-----------------------------------|--------------------------------------------------------------------|
| `prompt`: a text or turns         | TRL                                                                |
| `question`: a text or turns       | Orca's pairs, most often with a `system` column                    |
| `messages` or `conversations`     | LLaMA-Factory: the turns up to the answer                          |
| `instruction`, `input`, `history` | LLaMA-Factory's Alpaca format                                      |
| in `chosen` and `rejected`        | TRL, UltraFeedback: two chats with a common beginning              |
| in `chosen` and `rejected`        | HH: the same as text, "\n\nHuman: ...\n\nAssistant: ..."           |

A labelled row is any row of supervised training with a `label` (or `kto_tag`) of true or false, which says whether the
answer is a good one; it is KTO's data.  A pair is read as two labelled rows.

The other columns mean what they mean in supervised training (`formats.py`): `system`, `tools`, a `weight`, parts of the
question that would be lost.  Scores, and whatever else does not belong to the format, are listed in `Row.unused`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from fettle.data.formats import (
    alpaca_question,
    columns_of,
    holds,
    refuse_calls_and_media,
    text_or_turns,
    to_row,
    with_other_columns,
)
from fettle.data.read import read_as
from fettle.data.rows import LabelledRow, PreferenceRow, Row, RowList
from fettle.data.turns import REASONING, Message, message, says_something, turns
from fettle.data.values import kind, listed, text
from fettle.errors import UserError, option

SIDES = ("chosen", "rejected")
LABELS = ("label", "kto_tag")
IN_TURNS = {"messages": "messages", "conversations": "ShareGPT"}
"""Columns of turns, and the name of their format."""
QUESTIONS = (*IN_TURNS, "prompt", "question", "instruction")
EXPECTED_QUESTION = (
    "in prompt, question, messages, conversations or instruction, or as the beginning of both chats"
)
EXPECTED_PAIR = f"chosen and rejected, with their question {EXPECTED_QUESTION}"
EXPECTED_LABELLED = "a question, its answer and a `label` of true or false; or chosen and rejected"

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")

Words = str | tuple[Message, ...]
"""A question or an answer."""


def read_preferences(source: str | Path, *, skip_bad_rows: bool = False) -> RowList[PreferenceRow]:
    """Return the pairs of a file, a folder or a hub dataset. Raises and skips as `read_rows` does."""
    return read_as(source, to_pair, skip_bad_rows=skip_bad_rows)


def read_labelled(source: str | Path, *, skip_bad_rows: bool = False) -> RowList[LabelledRow]:
    """Return the labelled rows of a file, a folder or a hub dataset; a pair gives two (see `labelled_of`).

    Raises and skips as `read_rows` does.
    """
    read = read_as(source, to_labelled, skip_bad_rows=skip_bad_rows)
    return RowList(chain.from_iterable(read), read.reading)


def labelled_of(pairs: Iterable[PreferenceRow]) -> RowList[LabelledRow]:
    """Return each pair as a desirable row, its chosen answer, and an undesirable one, its rejected answer."""
    both = ((LabelledRow(pair.chosen, True), LabelledRow(pair.rejected, False)) for pair in pairs)
    return RowList(chain.from_iterable(both), pairs.reading if isinstance(pairs, RowList) else None)


def to_pair(record: Any, where: str) -> PreferenceRow:
    """Return the record of a file as a pair; raises `UserError` naming `where` if it is not a clear one."""
    present, filled = columns_of(record, where, EXPECTED_PAIR)
    _require_sides(present, filled, where)
    refuse_calls_and_media(filled, where)
    if name := next((name for name in REASONING if not isinstance(filled.get(name, False), bool)), None):
        raise UserError(
            f"{where}: has a column `{name}`, but it is not clear which answer it belongs to; make it a field of "
            "that turn, or remove it."
        )
    chosen, rejected = (_answer(filled[name], where, name) for name in SIDES)
    others = {name: value for name, value in filled.items() if name not in SIDES}
    if _is_whole_chat(chosen) != _is_whole_chat(rejected):
        raise UserError(
            f"{where}: one of `chosen` and `rejected` is a whole chat, the other only an answer; give both alike."
        )
    question: Words
    form, question = ("messages", ()) if _is_whole_chat(chosen) else _take_question(others, where)
    is_chat = not all(isinstance(words, str) for words in (question, chosen, rejected))
    rows = [_row(where, form, question, answer, is_chat) for answer in (chosen, rejected)]
    _require_one_question(others, rows, where)
    for name, row in zip(SIDES, rows, strict=True):
        _require_answer(row, f"`{name}`", where)
    if _words(rows[0]) == _words(rows[1]):
        raise UserError(f"{where}: `chosen` and `rejected` are the same answer; remove the row.")
    if is_chat:
        rows = _compared(*rows)
    return PreferenceRow(*(with_other_columns(row, dict(others), where) for row in rows))


def to_labelled(record: Any, where: str) -> tuple[LabelledRow, ...]:
    """Return the record of a file as one labelled row, or two if it is a pair; raises `UserError` naming `where`."""
    present, filled = columns_of(record, where, EXPECTED_LABELLED)
    if all(name in present for name in SIDES):
        return tuple(labelled_of([to_pair(record, where)]))
    is_desirable = _label(filled, where)
    row = to_row({name: value for name, value in present.items() if name not in LABELS}, where)
    if row.text is not None:
        raise UserError(
            f"{where}: has a label for a `text`, in which the answer cannot be told from the question; expected "
            "`prompt` and `completion`, or `messages`."
        )
    if row.messages and row.completion_turns is None:
        row = replace(row, completion_turns=1)
    _require_answer(row, "the answer" if row.messages else "`completion`", where)
    return (LabelledRow(row, is_desirable),)


def _require_sides(present: Mapping[str, Any], filled: Mapping[str, Any], where: str) -> None:
    if all(name in filled for name in SIDES):
        return
    if any(name in present for name in SIDES):
        missing = next(name for name in SIDES if name not in filled)
        fault = f"`{missing}` is empty" if missing in present else f"there is no `{missing}`"
        raise UserError(f"{where}: {fault}; expected an answer there; fill it in or remove the row.")
    if label := next((name for name in LABELS if name in filled), None):
        raise UserError(
            f"{where}: has no `chosen` and `rejected`, but a `{label}` of one answer; for such rows use "
            f"{option('method')} kto."
        )
    raise UserError(
        f"{where}: found {listed('column', present)}; expected {EXPECTED_PAIR}; rename the columns."
    )


def _answer(value: Any, where: str, name: str) -> Words:
    """Return the answer in a cell: its text, or its turns, which may be a whole chat."""
    value = text_or_turns(value, where, name)
    if isinstance(value, Mapping):
        return (message(value, f"{where}, {name}"),)
    if isinstance(value, list | tuple):
        return turns(value, f"{where}, {name}", name)
    words = text(value, where, name)
    return _transcript(words) or words


def _is_whole_chat(answer: Words) -> bool:
    return not isinstance(answer, str) and bool(answer) and answer[0]["role"] != "assistant"


def _transcript(words: str) -> tuple[Message, ...]:
    """Return the turns of a text with "Human:" and "Assistant:" before each, () if it is not such a text."""
    before, *pieces = _SPEAKER.split("\n\n" + words.strip())
    if before or pieces[:1] != ["Human"] or "Assistant" not in pieces[2::2]:
        return ()
    return tuple(
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    )


def _take_question(columns: dict[str, Any], where: str) -> tuple[str, Words]:
    """Take the question out of the columns; return the name of its format, and its text or turns."""
    name = next((name for name in QUESTIONS if name in columns), None)
    if name is None:
        raise UserError(
            f"{where}: has `chosen` and `rejected`, but no question; expected it {EXPECTED_QUESTION}."
        )
    if name == "instruction":
        taken = {part: columns.pop(part) for part in (name, "input", "history") if part in columns}
        return "Alpaca", alpaca_question(taken, where)
    value = columns.pop(name)
    if name in IN_TURNS:
        return IN_TURNS[name], turns(value, where, name)
    form = "prompt / completion"
    value = text_or_turns(value, where, name)
    if isinstance(value, list | tuple):
        return form, turns(value, where, name)
    words = text(value, where, name)
    said = _transcript(words)
    is_question = bool(said) and said[-1] == {"role": "assistant", "content": ""}
    return form, said[:-1] if is_question else words


def _row(where: str, form: str, question: Words, answer: Words, is_chat: bool) -> Row:
    """Return the row of one answer, as a chat or as two texts."""
    if not is_chat and isinstance(question, str) and isinstance(answer, str):
        return Row(where, form, prompt=question, completion=answer)
    asked = _as_turns(question, "user")
    if asked and asked[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"{where}: the question ends with the turn of the {asked[-1]['role']}; expected one of the user, which "
            "`chosen` and `rejected` answer."
        )
    return Row(where, form, messages=(*asked, *_as_turns(answer, "assistant")), completion_turns=1)


def _as_turns(words: Words, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": words},) if isinstance(words, str) else words


def _compared(chosen: Row, rejected: Row) -> list[Row]:
    """Return the two chats, trained on from where they differ. Raises `UserError` if that is not an answer in both."""
    shared = shared_length(chosen.messages, rejected.messages)
    turns_there = [
        row.messages[shared]["role"] if shared < len(row.messages) else "" for row in (chosen, rejected)
    ]
    if turns_there != ["assistant", "assistant"]:
        found = " and ".join(
            f"{f'a turn of the {role}' if role else 'missing'} in `{name}`"
            for name, role in zip(SIDES, turns_there, strict=True)
        )
        raise UserError(
            f"{chosen.where}: `chosen` and `rejected` do not answer the same question: turn {shared + 1}, the first "
            f"that differs, is {found}; expected an answer in both."
        )
    return [replace(row, completion_turns=len(row.messages) - shared) for row in (chosen, rejected)]


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in equal)


def _require_one_question(columns: Mapping[str, Any], rows: Sequence[Row], where: str) -> None:
    """Refuse a further column with a question, unless the rows contain it."""
    for name in QUESTIONS:
        if name not in columns:
            continue
        value = text_or_turns(columns[name], where, name)
        if name in IN_TURNS or isinstance(value, list | tuple):
            asked = turns(value, where, name)
            is_contained = any(row.messages[: len(asked)] == asked for row in rows)
        else:
            is_contained = any(holds(row, value) for row in rows)
        if not is_contained:
            raise UserError(
                f"{where}: has `{name}`, but `chosen` and `rejected` already have a question, which does not contain "
                "it; keep one of them."
            )


def _require_answer(row: Row, name: str, where: str) -> None:
    if row.messages and row.messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: {name} ends with the turn of the {row.messages[-1]['role']}; expected one of the assistant, "
            "the answer."
        )
    if not (says_something(row.messages[-1]) if row.messages else (row.completion or "").strip()):
        raise UserError(f"{where}: {name} is empty; expected an answer there; fill it in or remove the row.")


def _words(row: Row) -> list[Message] | str:
    """Return what two answers to one question are compared by, without the white space around it."""
    if row.completion is not None:
        return row.completion.strip()
    return [{**turn, "content": turn["content"].strip()} for turn in row.messages]


def _label(columns: Mapping[str, Any], where: str) -> bool:
    """Return the label: true or false, or the words true, false, 1 and 0, as all cells of a CSV are strings."""
    known = {"true": True, "1": True, "false": False, "0": False}
    said: dict[str, bool] = {}
    for name in LABELS:
        if name not in columns:
            continue
        value = columns[name]
        word = str(value).strip().lower() if isinstance(value, bool | str) else ""
        if word not in known:
            raise UserError(
                f"{where}: `{name}` is {kind(value)}; expected true (a good answer) or false (a bad one)."
            )
        said[name] = known[word]
    if not said:
        raise UserError(
            f"{where}: found {listed('column', columns)} but no `label` of true or false; expected {EXPECTED_LABELLED}."
        )
    if len(set(said.values())) > 1:
        raise UserError(f"{where}: {' and '.join(f'`{name}`' for name in said)} contradict each other.")
    return next(iter(said.values()))
