"""Read training data from wherever it lies: one file, a folder of files, or a dataset on the hub.

Every reader yields records (a mapping of columns, see `formats.py`) together with the place they came from,
"chats.jsonl, line 3", so that each later complaint about a row can say where to look.  Files are read as
UTF-8; anything else is refused with the line at which it stops being text.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fettle.data.formats import Row, to_row
from fettle.errors import UserError

Records = Iterator[tuple[Any, str]]


def read_rows(source: str | Path) -> list[Row]:
    """Return the rows of a file, of every data file in a folder, or of a hub dataset's train split.

    Raises `UserError` with the file and the line where something is missing, unreadable or of no known form.
    """
    if _is_hub_name(source):
        records = _hub_records(str(source))
    else:
        records = chain.from_iterable(_records(*file) for file in _data_files(Path(source)))
    rows = [to_row(record, where) for record, where in records]
    if not rows:
        raise UserError(f"{source}: has no rows; expected at least one.")
    return rows


def fingerprint(source: str | Path) -> str:
    """Return the SHA-256, in hexadecimal, of the files' bytes, or of a hub dataset's rows.

    The same data saved in another way (another form, other white space) has another fingerprint.
    """
    digest = hashlib.sha256()
    if _is_hub_name(source):
        contents = (json.dumps(record, default=str).encode() for record, _ in _hub_records(str(source)))
    else:
        contents = (_content(*file) for file in _data_files(Path(source)))
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)  # the length keeps two files apart
    return digest.hexdigest()


def _data_files(source: Path) -> list[tuple[Path, str]]:
    """The files to read, each with the name that messages use for it."""
    if source.is_dir():
        names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
        usable = [name for name in names if name.suffix.lower() in _READERS]
        visible = [name for name in usable if not any(part.startswith(".") for part in name.parts)]
        if not visible:
            raise UserError(f"{source}: the folder has no data files; expected {_EXTENSIONS}.")
        return [(source / name, str(name)) for name in visible]
    if not source.exists():
        raise UserError(
            f"{source}: there is no such file or folder; check the path "
            "(or give a hub dataset as owner/name)."
        )
    if source.suffix.lower() not in _READERS:
        found = f"the ending {source.suffix}" if source.suffix else "no file ending"
        raise UserError(f"{source.name}: has {found}; expected {_EXTENSIONS}.")
    return [(source, source.name)]


def _records(path: Path, name: str) -> Records:
    content = _content(path, name)
    if not content.strip():
        raise UserError(f"{name}: the file is empty; expected at least one row.")
    return _READERS[path.suffix.lower()](content, name)


def _content(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check its permissions.") from None


def _decode(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name}: the file is UTF-16; save it as UTF-8.")
    if b"\0" in content:
        raise UserError(
            f"{name}: the file is binary, not text; expected UTF-8 text as its ending "
            f"{Path(name).suffix} says."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            f"(if it is Latin-1: iconv -f latin1 -t utf-8)."
        ) from None


def _read_json_lines(content: bytes, name: str) -> Records:
    for number, line in enumerate(_decode(content, name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{name}, line {number}, column {error.colno}: malformed JSON ({error.msg}); "
                "expected one complete object on each line (a file that is one JSON list is named .json)."
            ) from None
        yield record, f"{name}, line {number}"


def _read_json(content: bytes, name: str) -> Records:
    text = _decode(content, name)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" not in text[: error.pos].strip():
            yield from _read_json_lines(content, name)  # one object per line under the wrong ending is common
            return
        raise UserError(
            f"{name}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg}); "
            "mend it there, or check that the file is complete."
        ) from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    elif isinstance(data, dict):
        data = [data]
    if not isinstance(data, list):
        raise UserError(f'{name}: expected a list of rows or {{"data": [...]}}; found neither.')
    yield from ((record, f"{name}, row {number}") for number, record in enumerate(data, start=1))


def _read_csv(content: bytes, name: str) -> Records:
    text = _decode(content, name)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a long chat is one long cell
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = reader.fieldnames or []
        line = reader.line_num + 1
        for record in reader:
            if None in record:
                cells = len(columns) + len(record[None])
                raise UserError(
                    f"{name}, line {line}: has {cells} cells but the header names {len(columns)}; "
                    "put cells that hold a separator in double quotes."
                )
            yield record, f"{name}, line {line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: malformed CSV ({error}); check the quotes there.") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(content: bytes, name: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name}: is not a readable parquet file ({reason}); download or write it anew."
        ) from None
    yield from ((record, f"{name}, row {number}") for number, record in enumerate(records, start=1))


def _read_text(content: bytes, name: str) -> Records:
    yield {"text": _decode(content, name)}, name


_READERS: dict[str, Callable[[bytes, str], Records]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
_EXTENSIONS = ", ".join(_READERS)


def _is_hub_name(source: str | Path) -> bool:
    """Whether the source reads as owner/name and nothing on this disk answers to it."""
    is_name = isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    return is_name and not Path(source).exists() and Path(source).suffix.lower() not in _READERS


def _hub_records(name: str) -> Records:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split="train")
    except Exception as error:  # the hub client raises a dozen kinds; the user needs one sentence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{name}: is no file or folder here, and its train split cannot be had from the hub ({reason}); "
            "check the name and the network, or give a local file."
        ) from None
    yield from ((record, f"{name}, row {number}") for number, record in enumerate(dataset, start=1))
