"""Read the header of a safetensors file and check it against the file's size.

A safetensors file is eight bytes of length (little-endian), that many bytes of JSON, then the tensors one after the
other (https://github.com/huggingface/safetensors, "Format"):

    {"name": {"dtype": "BF16", "shape": [32064, 3072], "data_offsets": [0, 197001216]}, ...}

So a few kilobytes give the names, dtypes, shapes and sizes, and an incomplete download is detected early.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from fettle.errors import UserError
from fettle.files import human_bytes

_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses longer ones too
_LFS_MARK = b"version https://git-lfs"


class TensorHeader(NamedTuple):
    """A tensor's dtype, as named in the header ("BF16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorPlace(NamedTuple):
    """The byte range of one tensor in its file: [start, end)."""

    header: TensorHeader
    start: int
    end: int


def read_places(file: Path) -> dict[str, TensorPlace]:
    """Parse a safetensors header and check it against the file; raises UserError if they disagree."""
    require_content(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if size < 8:
            raise _truncated(file, 8, size)
        length = struct.unpack("<Q", stream.read(8))[0]
        if not 0 < length <= _HEADER_LIMIT:
            raise _corrupt(file, f"its header claims a length of {length} bytes")
        if 8 + length > size:
            raise _truncated(file, 8 + length, size)
        entries = _parse_header(file, stream.read(length))
    data_start = 8 + length
    places = {name: _parse_entry(file, name, entry, data_start) for name, entry in entries.items()}
    if not places:
        raise UserError(f"{file} contains no tensors: fetch it again.")
    _check_contiguous(file, places, data_start, size)
    return places


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(file, "its header is not JSON") from error
    if not isinstance(entries, dict):
        raise _corrupt(file, "its header is not a JSON object")
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _corrupt(file, "its __metadata__ is not a map of strings to strings")
    return entries


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> TensorPlace:
    """Check the entry of one tensor: a known dtype, a shape, and a byte range of matching size."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, f"its entry for {name} is incomplete") from error
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise _corrupt(file, f"{name} has shape {shape} at bytes {start} to {end}")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise UserError(f"{file}: {name} is of type {dtype!r}, which safetensors does not define.")
    if math.prod(shape) * _DTYPE_BITS[dtype] != 8 * (end - start):
        raise _corrupt(file, f"{name} is {dtype} of shape {list(shape)} but takes {end - start} bytes")
    return TensorPlace(TensorHeader(dtype, shape), data_start + start, data_start + end)


def _check_contiguous(file: Path, places: dict[str, TensorPlace], data_start: int, size: int) -> None:
    """Check that the tensors follow each other without gap or overlap, from the header to the end of the file."""
    expected = data_start
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != expected:
            raise _corrupt(file, f"{name} starts at byte {place.start}, expected {expected}")
        expected = place.end
    if size < expected:
        raise _truncated(file, expected, size)
    if size > expected:
        raise _corrupt(file, f"{size - expected} bytes follow its last tensor")


def require_content(file: Path) -> None:
    """Raise UserError if `file` is not a readable file, is empty, or is a git-lfs pointer instead of the content."""
    if not file.is_file():
        raise UserError(f"{file} is not a file.")
    try:
        with open(file, "rb") as stream:
            start = stream.read(len(_LFS_MARK))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check its permissions.") from error
    if not start:
        raise UserError(f"{file} is empty: fetch it again.")
    if start == _LFS_MARK:
        raise UserError(
            f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` where it was cloned."
        )


def _corrupt(file: Path, finding: str) -> UserError:
    return UserError(f"{file} is not a valid safetensors file ({finding}): fetch it again.")


def _truncated(file: Path, expected: int, found: int) -> UserError:
    return UserError(
        f"{file} is truncated: it has {human_bytes(found)} of {human_bytes(expected)} "
        f"({expected - found} bytes missing); fetch it again."
    )
