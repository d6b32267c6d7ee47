"""Read training data: one file, a folder of files, or a dataset on the hub.

Every reader yields records (a mapping of columns, see `formats.py`) together with their location, such as
"chats.jsonl, line 3", for later error messages.  If a record cannot be read but those after it can, the error is
yielded in its place.  Files are read as UTF-8; anything else is refused with the line of the first invalid byte.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fettle.data.formats import to_row
from fettle.data.rows import BadRows, Reading, RowList, Rows
from fettle.data.source import SUFFIXES, data_files, path_name, train_split
from fettle.data.values import NotText, load_json, printable
from fettle.errors import UserError, reason_of

Records = Iterator[tuple[Any, str]]
Converted = TypeVar("Converted")

_IN_TABLES = "convert the column to text"
"""How to fix a number in a text column of a typed table."""


def read_rows(source: str | Path, *, skip_bad_rows: bool = False) -> Rows:
    """Return the rows of a file, of every data file in a folder, or of a dataset's train split.

    Raises `UserError` with the file and the line if something is missing or unreadable, and `BadRows` with all
    rows of unknown format; with `skip_bad_rows` these are skipped and listed in `reading.bad`.
    """
    rows = read_as(source, to_row, skip_bad_rows=skip_bad_rows)
    return Rows(rows, rows.reading)


def read_as(
    source: str | Path, convert: Callable[[Any, str], Converted], *, skip_bad_rows: bool = False
) -> RowList[Converted]:
    """Return what `convert(record, where)` makes of each record. Raises and skips as `read_rows` does."""
    reading = Reading()
    rows: list[Converted] = []
    for record, where, number_hint in _all_records(source, reading):
        try:
            if isinstance(record, UserError):
                raise record
            rows.append(convert(record, where))
        except NotText as error:
            reading.bad.append(f"{str(error).removesuffix('.')}; {number_hint}.")
        except UserError as error:
            reading.bad.append(reason_of(error))
    if reading.bad and not (skip_bad_rows and rows):
        raise BadRows(reading.bad, len(reading.bad) + len(rows))
    if not rows:
        raise UserError(f"{path_name(source)}: has no rows; expected at least one.")
    return RowList(rows, reading)


def fingerprint(source: str | Path) -> str:
    """Return the SHA-256, in hexadecimal, of the files' bytes, or of a hub dataset's rows.

    The same data saved differently (another format, other white space) has a different fingerprint.
    """
    digest = hashlib.sha256()
    if _is_hub_name(source):
        contents = (json.dumps(record, default=str).encode() for record, _ in _hub_records(str(source)))
    else:
        contents = (_content(*file) for file in data_files(Path(source)).files)
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)  # the length separates the files
    return digest.hexdigest()


def records(source: str | Path) -> Records:
    """Yield the records of a file or folder as they are, each with its location."""
    yield from ((record, where) for record, where, _ in _all_records(source, Reading()))


def _all_records(source: str | Path, reading: Reading) -> Iterator[tuple[Any, str, str]]:
    """Yield the records of the source, their locations, and the advice for a number in place of text there."""
    if _is_hub_name(source):
        reading.notes.append(f"read the split train of {source} from the hub")
        yield from ((*record, _IN_TABLES) for record in _hub_records(str(source)))
        return
    found = data_files(Path(source))
    reading.notes += found.notes
    for path, name in found.files:
        reader = _READERS[path.suffix.lower()]
        content = _content(path, name)
        if not content.strip():
            raise UserError(f"{name}: the file is empty; expected at least one row.")
        yield from ((*record, reader.number_hint) for record in reader.read(content, name, reading))


def _content(path: Path, name: str) -> bytes:
    if path.exists() and not path.is_file():  # reading it could wait for ever, and data are read twice
        raise UserError(f"{name}: is not a regular file, but a pipe or a device; save its content as a file.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check its permissions.") from None
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{name}: is a git-lfs pointer instead of the data; fetch it with `git lfs pull`.")
    return content


def _decode(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}: the file is UTF-16; save it as UTF-8.")
    if b"\0" in content:
        raise UserError(
            f"{name}: the file is binary; expected UTF-8 text, as its extension {Path(name).suffix} implies."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            f"(if it is Latin-1: iconv -f latin1 -t utf-8)."
        ) from None


def _read_json_lines(content: bytes, name: str, reading: Reading) -> Records:
    for number, line in enumerate(_decode(content, name).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            yield load_json(line), where
        except json.JSONDecodeError as error:
            yield (
                UserError(
                    f"{where}, column {error.colno}: malformed JSON ({error.msg}); "
                    "expected one complete object per line (a file that is one JSON list must be named .json)."
                ),
                where,
            )


def _read_json(content: bytes, name: str, reading: Reading) -> Records:
    text = _decode(content, name)
    try:
        data = load_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
            yield from _read_json_lines(content, name, reading)  # JSON lines named .json are common
            return
        raise UserError(
            f"{name}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg}); "
            "fix it there, or check that the file is complete."
        ) from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    elif isinstance(data, dict):
        data = _split_in(data, name, reading) or [data]
    if not isinstance(data, list):
        raise UserError(f'{name}: expected a list of rows or {{"data": [...]}}; found neither.')
    yield from ((record, f"{name}, row {number}") for number, record in enumerate(data, start=1))


def _split_in(data: dict[str, Any], name: str, reading: Reading) -> list[Any] | None:
    """Return the rows of the train split, if the object has one list of rows per split."""
    is_splits = "train" in data and all(
        isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows) for rows in data.values()
    )
    if not is_splits:
        return None
    split = train_split(data, name)
    others = ", ".join(printable(other) for other in data if other != split)
    reading.notes.append(f"read the split {split} of {name}" + (f"; left out: {others}" if others else ""))
    rows: list[Any] = data[split]
    return rows


def _read_csv(content: bytes, name: str, reading: Reading) -> Records:
    text = _decode(content, name)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a long chat is one long cell
    line = 1
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = reader.fieldnames or []
        if twice := next((column for column in columns if columns.count(column) > 1), None):
            raise UserError(f"{name}, line 1: has two columns named {printable(twice)}; rename one of them.")
        line = reader.line_num + 1
        for record in reader:
            where = f"{name}, line {line}"
            if None in record:
                cells = len(columns) + len(record[None])
                message = f"{where}: has {cells} cells, but the header has {len(columns)}; "
                yield UserError(message + "put cells that contain the separator in double quotes."), where
            else:
                yield record, where
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: malformed CSV ({error}); check the quotes there.") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(content: bytes, name: str, reading: Reading) -> Records:
    import pyarrow.parquet

    yield from _table(lambda: pyarrow.parquet.read_table(io.BytesIO(content)), name, "parquet")


def _read_arrow(content: bytes, name: str, reading: Reading) -> Records:
    import pyarrow.ipc

    def load() -> Any:
        if content.startswith(b"ARROW1"):
            return pyarrow.ipc.open_file(io.BytesIO(content)).read_all()
        return pyarrow.ipc.open_stream(io.BytesIO(content)).read_all()

    yield from _table(load, name, "arrow")


def _table(load: Callable[[], Any], name: str, kind: str) -> Records:
    try:
        records: Iterable[Any] = load().to_pylist()
    except Exception as error:  # pyarrow raises many types for damaged files
        raise UserError(
            f"{name}: is not a readable {kind} file ({reason_of(error)}); download or write it again."
        ) from None
    yield from ((record, f"{name}, row {number}") for number, record in enumerate(records, start=1))


def _read_text(content: bytes, name: str, reading: Reading) -> Records:
    yield {"text": _decode(content, name)}, name


@dataclass(frozen=True, slots=True)
class _Reader:
    """How a file type is read, and the advice for a number in a text column."""

    read: Callable[[bytes, str, Reading], Records]
    number_hint: str = "put it in quotes"


_READERS = {
    ".jsonl": _Reader(_read_json_lines),
    ".json": _Reader(_read_json),
    ".csv": _Reader(_read_csv),
    ".parquet": _Reader(_read_parquet, _IN_TABLES),
    ".txt": _Reader(_read_text),
    ".arrow": _Reader(_read_arrow, _IN_TABLES),
}


def _is_hub_name(source: str | Path) -> bool:
    """Whether the source looks like owner/name and no such local path exists."""
    is_name = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    return is_name and not os.path.exists(source) and Path(source).suffix.lower() not in SUFFIXES


def _hub_records(name: str) -> Records:
    from datasets import load_dataset

    try:
        for number, record in enumerate(load_dataset(name, split="train"), start=1):
            yield record, f"{name}, row {number}"
    except Exception as error:  # the hub client raises many types; the user needs one sentence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{name}: is not a local file or folder, and its train split cannot be loaded from the hub ({reason}); "
            "check the name and the network, or give a local file."
        ) from None
