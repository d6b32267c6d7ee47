"""Fingerprints of weights and tokenizers: equal for equal contents, fast for any size."""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from fettle.checkpoints.folder import weight_files
from fettle.checkpoints.safetensors_header import TensorPlace, read_places
from fettle.files import sha256_of


def fingerprint(folder: Path) -> str:
    """Return a SHA-256, in hex, that is equal for equal weights however they are sharded.

    It covers every tensor's name, dtype, shape and a sample of at most 4 kB of its bytes, spread over the whole
    tensor: fast for any size, and different once an optimizer or a merge has changed the weights. `folder` may be
    that of a model or an adapter.
    """
    digests: dict[str, bytes] = {}
    for file in weight_files(folder):
        places = read_places(file)
        with open(file, "rb") as stream:
            for name, place in places.items():
                digests[name] = _sample_digest(stream, place)
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(hashlib.sha256(name.encode()).digest() + digests[name])
    return total.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Return a SHA-256, in hex, of the files that determine tokenization, chat template and stop tokens."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    return sha256_of(Path(folder) / name for name in names if (Path(folder) / name).exists())


def _sample_digest(stream: BinaryIO, place: TensorPlace, pieces: int = 16, piece_bytes: int = 256) -> bytes:
    """Hash a tensor's dtype, shape and `pieces` evenly spaced pieces of its bytes, including first and last."""
    digest = hashlib.sha256(json.dumps(place.header).encode())
    size = place.end - place.start
    if size <= pieces * piece_bytes:
        stream.seek(place.start)
        digest.update(stream.read(size))
        return digest.digest()
    for piece in range(pieces):
        stream.seek(place.start + (size - piece_bytes) * piece // (pieces - 1))
        digest.update(stream.read(piece_bytes))
    return digest.digest()
