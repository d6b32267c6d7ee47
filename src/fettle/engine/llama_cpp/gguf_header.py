"""Read and check the header of a GGUF file before llama.cpp opens it, as llama.cpp aborts the process on some faults.

    magic "GGUF", version, number of tensors, number of entries
    entries:  name, type, value (a text is its length and bytes, an array its type, length and items)
    tensors:  name, number of dimensions, dimensions, type, offset of its bytes in the data
    data, from the next multiple of general.alignment on

Numbers are little-endian (https://github.com/ggml-org/ggml, docs/gguf.md).
"""

import math
import mmap
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from fettle.checkpoints.locate import GGUF_MAGIC
from fettle.errors import UserError

VERSIONS = (2, 3)
LONGEST_NAME, MOST_DIMENSIONS = 65535, 4
_TEXT, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize(f"<{letter}") for kind, letter in _FORMATS.items()}


@dataclass(slots=True)
class Header:
    """entries: scalars and texts by name; arrays: lengths; tensors: shapes, innermost dimension first.

    token_types: the kinds of tokens in the vocabulary, as llama.cpp numbers them.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    token_types: frozenset[int] = frozenset()


TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPES = "tokenizer.ggml.token_type"
BYTE, WITH_BYTES = 6, ("llama", "t5")
"""The type of tokens that stand for a byte, and the tokenizers (`tokenizer.ggml.model`) that have them."""

MOST_LAYERS = 512
"""llama.cpp's own limit; it aborts beyond it."""
ROPE_TYPES = ("none", "linear", "yarn", "longrope")


class _Malformed(Exception):
    """Describes the fault."""


def read_header(path: Path) -> Header:
    """Return the file's header. Raises UserError if it contradicts itself or the file's size."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _HeaderReader(data).header()
        _check_entries(header)
        return header
    except _Malformed as fault:
        raise UserError(f"{path} is damaged ({fault}): fetch or export it again.") from None
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"{path} cannot be read ({error}): give the path of a GGUF file.") from error


def _check_entries(header: Header) -> None:
    """Raise _Malformed for values at which llama.cpp aborts instead of refusing the file."""
    entries, arrays = header.entries, header.arrays
    for name, value in entries.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _Malformed(f"{name} is {value}")
        if name.endswith("epsilon") and not (isinstance(value, float) and value >= 0):
            raise _Malformed(f"{name} is {value!r}, expected a number of 0 or more")
    architecture = entries.get("general.architecture")
    if not isinstance(architecture, str):
        raise _Malformed("it names no architecture")
    if entries.get("general.type", "model") != "model":
        return  # such as an adapter

    def size(name: str, default: int | None = None, most: int = 2**31 - 1) -> int | None:
        value = entries.get(f"{architecture}.{name}", default)
        if f"{architecture}.{name}" in arrays:  # one per layer
            return default
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise _Malformed(
                f"{architecture}.{name} is {value!r}, expected a whole number from 1 to {most:,}"
            )
        return value

    size("block_count", most=MOST_LAYERS)
    size("context_length")
    width = size("embedding_length")
    # a state-space model has no attention and states 0 heads
    has_attention = any(".attn_q" in name for name in header.tensors)
    heads = size("attention.head_count", most=width or 2**16) if has_attention else None
    groups = size("attention.head_count_kv", heads, most=heads or 2**16)
    if heads and groups and heads % groups:
        raise _Malformed(f"{groups} key-value heads do not divide {heads} attention heads")
    key = size("attention.key_length", width // heads if width and heads else None, most=2**16)
    size("attention.value_length", most=2**16)
    size("rope.dimension_count", most=key or 2**16)
    if (kind := entries.get(f"{architecture}.rope.scaling.type", "none")) not in ROPE_TYPES:
        raise _Malformed(
            f"{architecture}.rope.scaling.type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}"
        )
    tokenizer = entries.get("tokenizer.ggml.model")
    if BYTE in header.token_types and tokenizer not in WITH_BYTES:
        raise _Malformed(f"it has byte tokens, which a tokenizer of the kind {tokenizer!r} does not")
    tokens = arrays.get(TOKENS)
    for name in ("tokenizer.ggml.scores", TOKEN_TYPES):
        if tokens is not None and arrays.get(name, tokens) != tokens:
            raise _Malformed(f"{name} has {arrays[name]:,} items for {tokens:,} tokens")
    shape = header.tensors.get("token_embd.weight")
    if tokens is not None and shape is not None and shape[-1] != tokens:
        raise _Malformed(f"it has {tokens:,} tokens, but its embedding has {shape[-1]:,} rows")


class _HeaderReader:
    """Reads the parts of the header in order."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> Header:
        found = Header()
        if self.data[:4] != GGUF_MAGIC:
            raise _Malformed(f"it begins with {self.data[:4]!r}, expected {GGUF_MAGIC!r}")
        self.at = 4
        if (version := self.number("I")) not in VERSIONS:
            raise _Malformed(f"its version is {version}, expected {' or '.join(map(str, VERSIONS))}")
        tensors, entries = self.number("Q"), self.number("Q")
        for _ in range(self.plausible(entries, least=13, what="entries")):
            self.entry(found)
        places = [self.tensor(found) for _ in range(self.plausible(tensors, least=24, what="tensors"))]
        self.check_places(found, places)
        return found

    def entry(self, found: Header) -> None:
        name = self.text(LONGEST_NAME)
        if name in found.entries or name in found.arrays:
            raise _Malformed(f"{name!r} appears twice")
        kind = self.number("I")
        if kind == _ARRAY:
            found.arrays[name] = self.array(name)
            if name == TOKEN_TYPES:
                found.token_types = self.items_before(found.arrays[name])
        else:
            found.entries[name] = self.value(kind, name)

    def value(self, kind: int, name: str) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind not in _FORMATS:
            raise _Malformed(f"{name!r} is of type {kind}, which GGUF does not define")
        return self.number(_FORMATS[kind])

    def array(self, name: str) -> int:
        """Skip an array; return its length."""
        kind, length = self.number("I"), self.number("Q")
        if kind == _TEXT:
            self.plausible(length, least=8, what=f"texts in {name!r}")
            size, at, unpack = len(self.data), self.at, struct.Struct("<Q").unpack_from
            begins = [at]
            for _ in range(length):  # the hot loop: once per token of the vocabulary
                if at + 8 > size:
                    raise _Malformed(f"it ends within {name!r}")
                at += 8 + unpack(self.data, at)[0]
                begins.append(at)
            self.at = at
            self.require(0)
            if name == TOKENS:
                self.require_different(begins)
        elif kind in _SIZES:
            self.require(self.plausible(length, least=_SIZES[kind], what=f"items in {name!r}") * _SIZES[kind])
            self.at += length * _SIZES[kind]
        else:
            raise _Malformed(f"{name!r} has items of type {kind}, which GGUF does not define")
        return length

    def require_different(self, begins: list[int]) -> None:
        """Raise _Malformed if two tokens have the same text. begins: where each begins, and the end of the last."""
        texts: set[bytes] = set()
        for begin, end in pairwise(begins):
            text = self.data[begin + 8 : end]
            if text in texts:
                raise _Malformed(f"the token {text.decode(errors='replace')!r} appears twice")
            if text:  # llama.cpp names empty tokens itself
                texts.add(text)

    def items_before(self, length: int) -> frozenset[int]:
        """Return the different numbers of an array of 32-bit ones that ends here."""
        start = self.at - 4 * length
        return (
            frozenset(np.frombuffer(self.data[start : self.at], dtype="<i4").tolist())
            if start > 0
            else frozenset()
        )

    def tensor(self, found: Header) -> tuple[str, int, int]:
        """Read one tensor's entry; return its name, offset and bytes."""
        name, dimensions = self.text(LONGEST_NAME), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Malformed(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        if name in found.tensors:
            raise _Malformed(f"tensor {name!r} appears twice")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _Malformed(f"tensor {name!r} is of unknown type {kind}") from None
        if 0 in shape or shape[0] % block:
            raise _Malformed(f"tensor {name!r} has shape {shape}, not a multiple of its block size {block}")
        found.tensors[name] = shape
        return name, offset, math.prod(shape) // block * block_bytes

    def check_places(self, found: Header, places: list[tuple[str, int, int]]) -> None:
        alignment = found.entries.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise _Malformed(f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-self.at // alignment) * alignment
        for name, offset, size in places:
            if offset % alignment:
                raise _Malformed(f"tensor {name!r} begins at {offset}, which is not aligned to {alignment}")
            if start + offset + size > len(self.data):
                raise _Malformed(
                    f"tensor {name!r} ends {start + offset + size - len(self.data):,} bytes after the file's end"
                )

    # --- parts ---------------------------------------------------------------------------------------------

    def number(self, letter: str) -> Any:
        self.require(size := struct.calcsize(f"<{letter}"))
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += size
        return value

    def text(self, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise _Malformed(f"a name is {length:,} bytes long")
        self.require(length)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise _Malformed(f"a text at byte {self.at - length:,} is not UTF-8") from None

    def plausible(self, count: int, least: int, what: str) -> int:
        """Return `count` if that many items of at least `least` bytes fit into the rest of the file."""
        if count * least > len(self.data) - self.at:
            raise _Malformed(f"it claims {count:,} {what}, more than fit into the file")
        return count

    def require(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise _Malformed("it ends within its header")
