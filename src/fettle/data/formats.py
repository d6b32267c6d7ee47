"""The formats of training rows, detected from the columns.

Five formats are in common use:

| format              | columns                                                                |
|---------------------|------------------------------------------------------------------------|
| messages            | `messages`: a list of {role, content} (OpenAI's format)                |
| ShareGPT            | `conversations`: a list of {from, value}                               |
| Alpaca              | `instruction`, `output`; optional `input`, `history`                   |
| prompt / completion | `prompt`, `completion`: texts, or lists of messages                    |
| text                | `text`                                                                 |

Any row may have a `weight` of 0 or 1 that applies to all of it, under any name that a turn may use (`WEIGHTS` in
`turns.py`).  Any other number in `loss` is a measured loss, which is metadata and is reported as unused.  All formats
except text may have a `system` column and the `tools` (or `functions`) that the assistant may call, and those with a
single answer may have a column with its reasoning.  Turns may call tools: `tool_calls` or `function_call` in messages,
turns from `function_call` in ShareGPT, answered by turns of the role `tool`, `function` or `observation`.  An empty
column (null, NaN, blank, an empty list) counts as absent, so one table may mix formats row by row.  NaN is a value in
JSON, parquet and arrow files; in a CSV cell it cannot be distinguished from the word and is text.

Rows that would be trained wrongly are refused rather than guessed at: preference data (a supervised loss would also
teach the rejected answers; `preference_formats.py` reads it), media, numbers instead of text, and columns that
belong to the question but not to the format.  Every other column (an id, a source) is ignored and listed in
`Row.unused`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fettle.data.rows import Row
from fettle.data.tool_calls import tool_list
from fettle.data.turns import (
    MEDIA,
    REASONING,
    TOOL_FIELDS,
    Message,
    is_weight,
    trained,
    turns,
    with_one_reasoning,
)
from fettle.data.values import (
    is_absent,
    is_absent_list,
    is_null,
    kind,
    listed,
    listing,
    parsed,
    printable,
    text,
)
from fettle.errors import UserError, option

EXPECTED = "messages, conversations, instruction + output, prompt + completion, or text"
TOOLS = ("tools", "functions")
LISTS = ("messages", "conversations", "history", *TOOLS, *TOOL_FIELDS, *MEDIA)
SYSTEM = ("system", "system_prompt", "system_message")
QUESTION = ("history", "instruction", "input", "context")
"""Columns that contain a part of the question in many formats."""

_MARKS = re.compile(
    r"(?:<\|\w+\|>|<start_of_turn>)(?:(?:system|user|assistant|model)(?=\n|<))?|<end_of_turn>|</?s>|\[/?INST\]"
)
"""What chat templates write around a turn, including the name of its role."""

_TURNS_IN_JSON = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content|from|value)["']\s*:""")

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Format:
    """A format: its required columns, its optional columns, and the function that converts a record to a row."""

    columns: tuple[str, ...]
    convert: Callable[[Record, str], Row]
    optional: tuple[str, ...] = ()


def to_row(record: Any, where: str) -> Row:
    """Return the record of a file as a `Row`; raises `UserError` naming `where` if its format is not known."""
    present, filled = columns_of(record, where, EXPECTED)
    _refuse_preferences(filled, where)
    refuse_calls_and_media(filled, where)
    format_ = _detect_format(present, filled)
    if format_ is None:
        raise UserError(_unknown_format(record, present, where))
    row = format_.convert(present, where)
    others = {
        name: value for name, value in filled.items() if name not in (*format_.columns, *format_.optional)
    }
    return with_other_columns(row, others, where)


def columns_of(record: Any, where: str, expected: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record's columns that have a value, and those of them that are not empty."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: found {kind(record)}; expected an object with named columns: {expected}.")
    present = {str(name): value for name, value in record.items() if not is_null(value)}
    return present, {name: value for name, value in present.items() if not _is_absent(name, value)}


def _is_absent(name: str, value: Any) -> bool:
    return is_absent_list(value) if name in LISTS else is_absent(value)


def _detect_format(present: Record, filled: Record) -> _Format | None:
    """Return the first format whose columns are all present, at least one of them non-empty.

    So a table that keeps a `text` or `prompt` column next to the chat it was made from is a chat, and an empty answer
    stays an empty answer instead of making the row match another format.
    """
    complete = [format_ for format_ in _FORMATS if all(column in present for column in format_.columns)]
    begun = (format_ for format_ in complete if any(column in filled for column in format_.columns))
    return next(begun, complete[0] if complete else None)


def _unknown_format(record: Record, present: Record, where: str) -> str:
    empty = {
        str(name): "null" if value is None else "NaN" for name, value in record.items() if is_null(value)
    }
    return (
        f"{where}: found {listed('column', present)}"
        + (
            f" and no value ({' or '.join(sorted(set(empty.values())))}) in {', '.join(empty)}"
            if empty
            else ""
        )
        + f"; expected {EXPECTED}; rename the columns or fill in the missing one."
    )


def _refuse_preferences(filled: Record, where: str) -> None:
    """Refuse rows made for DPO (chosen/rejected) or KTO (an answer and a true/false label)."""
    pair = [name for name in filled if name in ("chosen", "rejected") or name.startswith("rejected_")]
    is_answer = any(name in filled for name in ("messages", "conversations", "completion"))
    labels = ("label", "kto_tag") if is_answer else ("kto_tag",)
    label = next((name for name in labels if str(filled.get(name)).lower() in ("true", "false")), None)
    if not pair and label is None:
        return
    found = " and ".join(f"`{printable(name)}`" for name in pair) or f"a true/false `{label}`"
    raise UserError(
        f"{where}: has {found}, which is preference data; supervised training would also learn the rejected "
        f"answers, so train on it with {option('method')} {'dpo' if pair else 'kto'}, or keep only the good answers, "
        "as `messages` or `prompt` and `completion`."
    )


def refuse_calls_and_media(filled: Record, where: str) -> None:
    for name in filled:
        if name in TOOL_FIELDS:
            raise UserError(
                f"{where}: has a column `{name}`, but it is not clear which answer it belongs to; make it a field "
                "of that turn, or remove it."
            )
        if name in MEDIA:
            raise UserError(
                f"{where}: has `{name}`, but fettle trains on text only; remove these rows, or the "
                f"`{name}` column if the text does not refer to it."
            )


def _from_messages(record: Record, where: str) -> Row:
    return Row(where, "messages", messages=_chat(record["messages"], where, "messages"))


def _from_sharegpt(record: Record, where: str) -> Row:
    return Row(where, "ShareGPT", messages=_chat(record["conversations"], where, "conversations"))


def _from_alpaca(record: Record, where: str) -> Row:
    question = alpaca_question(record, where)
    answer = {"role": "assistant", "content": text(record["output"], where, "output")}
    return Row(where, "Alpaca", messages=(*question, answer))


def alpaca_question(record: Record, where: str) -> tuple[Message, ...]:
    """Return the turns of `history`, then `instruction` and `input` as one user turn."""
    request = text(record["instruction"], where, "instruction")
    extra = text(record.get("input", ""), where, "input")
    messages: list[Message] = []
    for pair in listing(record.get("history", []), where, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"{where}: `history` contains {kind(pair)}; expected pairs of [request, answer], both text."
            )
        messages += _turn_pair(*(text(words, where, "history") for words in pair))
    request = "\n\n".join(part for part in (request, extra) if part.strip())
    return (*messages, {"role": "user", "content": request})


def _from_prompt(record: Record, where: str) -> Row:
    prompt = text_or_turns(record["prompt"], where, "prompt")
    completion = text_or_turns(record["completion"], where, "completion")
    format_ = "prompt / completion"
    if not isinstance(prompt, list | tuple) and not isinstance(completion, list | tuple):
        prompt, completion = text(prompt, where, "prompt"), text(completion, where, "completion")
        return Row(where, format_, prompt=prompt, completion=completion)
    context = turns(prompt, where, "prompt", role_of_text="user")
    answer = turns(completion, where, "completion", role_of_text="assistant")
    _require_assistant(answer, where)
    return Row(where, format_, messages=context + answer, completion_turns=len(answer))


def text_or_turns(value: Any, where: str, name: str) -> Any:
    """Return the value, parsed if it is a cell with a list of turns as JSON; other JSON is the text of an answer."""
    if not (isinstance(value, str) and _TURNS_IN_JSON.match(value)):
        return value
    found = parsed(value, where, name, opening="[")
    are_turns = all(
        isinstance(turn, Mapping) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in found
    )
    return found if are_turns else value


def _from_text(record: Record, where: str) -> Row:
    return Row(where, "text", text=text(record["text"], where, "text"))


_FORMATS = [
    _Format(("messages",), _from_messages),
    _Format(("conversations",), _from_sharegpt),
    _Format(("instruction", "output"), _from_alpaca, optional=("input", "history")),
    _Format(("prompt", "completion"), _from_prompt),
    _Format(("text",), _from_text),
]


def with_other_columns(row: Row, others: dict[str, Any], where: str) -> Row:
    """Apply the columns outside the format; those that are used are removed from `others`, the rest is unused."""
    _require_whole_question(row, others, where)
    weights = [name for name, value in others.items() if is_weight(name, value)]
    is_trained = trained({name: others.pop(name) for name in weights}, where)
    row = _with_reasoning(_with_system(_with_tools(row, others, where), others, where), others, where)
    unused = tuple(printable(name) for name in others)
    return replace(row, is_trained=is_trained is not False, unused=unused)


def _require_whole_question(row: Row, others: Record, where: str) -> None:
    """Refuse a column that the question seems to need.

    If the question contains the column's text, it was made from that column. A column of messages is complete, except
    for earlier exchanges in a `history`.
    """
    is_complete = row.format in ("messages", "ShareGPT", "text")
    for name in ("history", *(SYSTEM if row.text is not None else ())) if is_complete else QUESTION:
        if name in others and not holds(row, others[name]):
            raise UserError(
                f"{where}: has `{name}`, which the {row.format} format does not use, so its text would be "
                "lost; move it into the question, or remove the column."
            )


def _with_tools(row: Row, others: dict[str, Any], where: str) -> Row:
    """Return the row as a chat with the tools of its column, if there is one."""
    names = [name for name in TOOLS if name in others]
    if not names:
        return row
    if row.text is not None or len(names) > 1:
        found = " and ".join(f"`{name}`" for name in names)
        reason = (
            "keep one of them" if row.text is None else "which a plain text cannot use; remove the column"
        )
        raise UserError(f"{where}: has {found}{';' if row.text is None else ','} {reason}.")
    return replace(_as_chat(row), tools=tool_list(others.pop(names[0]), where, names[0]))


def _with_system(row: Row, others: dict[str, Any], where: str) -> Row:
    """Return the row as a chat that begins with the system column, if there is one."""
    found = {name: text(others.pop(name), where, name) for name in SYSTEM if name in others}
    if not found or row.text is not None:
        return row
    chat = _as_chat(row)
    words = {*found.values(), *(m["content"] for m in chat.messages if m["role"] == "system")}
    if len({each.strip() for each in words}) > 1:
        raise UserError(
            f"{where}: has {' and '.join(f'`{name}`' for name in found)} and a different system text as well; "
            "keep one of them."
        )
    if any(turn["role"] == "system" for turn in chat.messages):
        return row
    return replace(chat, messages=({"role": "system", "content": words.pop()}, *chat.messages))


def _with_reasoning(row: Row, others: dict[str, Any], where: str) -> Row:
    """Return the row as a chat whose answer has the reasoning from the row's column, if there is one.

    A column that is only true or false is a flag about the reasoning, not the reasoning itself.
    """
    names = [name for name in REASONING if name in others and not isinstance(others[name], bool)]
    if not names:
        return row
    found = {name: text(others.pop(name), where, name) for name in names}
    row = _as_chat(row)
    answers = [turn for turn in row.messages[-(row.completion_turns or 1) :] if turn["role"] == "assistant"]
    if (
        row.format in ("messages", "ShareGPT", "text")
        or len(answers) != 1
        or answers[0] is not row.messages[-1]
    ):
        raise UserError(
            f"{where}: has a column `{names[0]}`, but it is not clear which answer it belongs to; make it a field "
            "of that turn, or remove it."
        )
    answer = answers[0]
    if "</think>" in answer["content"]:
        raise UserError(
            f"{where}: has a column `{names[0]}`, but the answer contains reasoning in <think> too; keep one of them."
        )
    if own := [name for name in names if answer.get(name, found[name]) != found[name]]:
        raise UserError(
            f"{where}: has a column `{own[0]}`, but the answer has a different `{own[0]}`; keep one of them."
        )
    return replace(row, messages=(*row.messages[:-1], with_one_reasoning({**answer, **found}, where)))


def holds(row: Row, words: Any) -> bool:
    """Whether the row's question or text already contains `words`, as whole consecutive lines."""
    asked = [turn["content"] for turn in row.messages if turn["role"] != "assistant"]
    texts = [each for each in (row.prompt, row.text, *asked) if each is not None]
    wanted = _lines(words) if isinstance(words, str) else ""
    return bool(wanted.strip()) and any(wanted in _lines(each) for each in texts)


def _lines(words: str) -> str:
    """Return the non-blank lines, each between newlines; tags of a chat template end a line too."""
    lines = (line.strip() for line in _MARKS.sub("\n", words).splitlines())
    return "\n" + "".join(f"{line}\n" for line in lines if line)


def _as_chat(row: Row) -> Row:
    """Convert a prompt and its completion to a user turn and an assistant turn."""
    if row.prompt is None or row.completion is None:
        return row
    messages = tuple(_turn_pair(row.prompt, row.completion))
    return replace(row, messages=messages, completion_turns=1, prompt=None, completion=None)


def _chat(value: Any, where: str, column: str) -> tuple[Message, ...]:
    messages = turns(value, where, column)
    _require_assistant(messages, where)
    return messages


def _turn_pair(request: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _require_assistant(messages: tuple[Message, ...], where: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}: has no assistant turn, so there is nothing to train on; "
            "add an answer or remove the row."
        )
