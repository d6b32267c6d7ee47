"""Run a GGUF file in llama.cpp itself: the library inside the `xllamacpp` wheel, through its C interface.

Only what the interface has kept stable is relied on. Parameter structs are taken from llama.cpp's own defaults and
handed back as opaque bytes; the four sizes at the head of the context's are recognised by their default values, and a
library that has others is refused. A faulty file can end the process, so `fettle.export.gguf.verify` runs this module
as a child: `python -m fettle.export.gguf.llama_cpp request.json answer.npz`.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fettle.errors import UserError
from fettle.export.gguf.ggml import library

OPAQUE_BYTES = 4096
"""More than any parameter struct has."""

DEFAULT_SIZES = (512, 2048, 512, 1)
"""n_ctx, n_batch, n_ubatch, n_seq_max."""


class Opaque(ctypes.Structure):
    """A struct of llama.cpp, its inside unknown."""

    _fields_ = [("sizes", ctypes.c_uint32 * 4), ("rest", ctypes.c_byte * (OPAQUE_BYTES - 16))]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class LlamaCpp:
    """An opened GGUF file. Contexts are made afresh for each text."""

    def __init__(self, path: Path, *, vocabulary_only: bool = False) -> None:
        self.llama = _declared(library())
        self.log: list[str] = []
        self._callback = LogCallback(
            lambda level, text, _: self.log.append((text or b"").decode("utf-8", "replace"))
        )
        self.llama.llama_log_set(self._callback, None)
        self.llama.llama_backend_init()
        self.model = self.llama.llama_model_load_from_file(
            str(path).encode(), self.llama.llama_model_default_params()
        )
        if not self.model:
            raise UserError(f"llama.cpp does not open {path}: {''.join(self.log[-3:]).strip()}")
        self.vocabulary = self.llama.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.llama.llama_vocab_n_tokens(self.vocabulary)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the ids of `text`, special tokens in it recognised."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self.llama.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), add_special, True)
        return list(ids[:count])

    def logits(self, ids: list[int], context_tokens: int | None = None) -> np.ndarray:
        """Return the logits, fp32 (tokens, vocabulary), at every position of `ids`."""
        context = self._context(context_tokens or max(len(ids), 32))
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, index in enumerate(ids):
                batch.token[position], batch.pos[position] = index, position
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
                batch.logits[position] = 1
            if self.llama.llama_decode(context, batch) != 0:
                raise UserError(f"llama.cpp cannot run the model: {''.join(self.log[-3:]).strip()}")
            rows = [self.llama.llama_get_logits_ith(context, at) for at in range(len(ids))]
            return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in rows])
        finally:
            self.llama.llama_batch_free(batch)
            self.llama.llama_free(context)

    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """Return the greedy continuation, `new_tokens` long."""
        grown = list(ids)
        for _ in range(new_tokens):
            grown.append(int(self.logits(grown, len(ids) + new_tokens)[-1].argmax()))
        return grown[len(ids) :]

    def _context(self, tokens: int) -> ctypes.c_void_p:
        parameters = self.llama.llama_context_default_params()
        if tuple(parameters.sizes) != DEFAULT_SIZES:
            raise UserError(
                "The installed xllamacpp has a newer interface than fettle knows; use an older one."
            )
        parameters.sizes[0] = parameters.sizes[1] = parameters.sizes[2] = tokens
        context: ctypes.c_void_p = self.llama.llama_init_from_model(self.model, parameters)
        if not context:
            raise UserError(f"llama.cpp cannot run the model: {''.join(self.log[-3:]).strip()}")
        return context


def _declared(llama: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    numbers = ctypes.POINTER(number)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_log_set": (None, [LogCallback, pointer]),
        "llama_backend_init": (None, []),
        "llama_model_default_params": (Opaque, []),
        "llama_context_default_params": (Opaque, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Opaque]),
        "llama_init_from_model": (pointer, [pointer, Opaque]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (number, [pointer]),
        "llama_tokenize": (number, [pointer, ctypes.c_char_p, number, numbers, number, flag, flag]),
        "llama_batch_init": (Batch, [number, number, number]),
        "llama_batch_free": (None, [Batch]),
        "llama_decode": (number, [pointer, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, number]),
        "llama_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    return llama


def answer(request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Do what a request asks.

    request: `model`, a path; `texts`, to cut into ids; `inputs`, lists of ids to give the logits of;
    `prompt`, ids to go on from by `new_tokens`. Returns arrays `ids_0`…, `logits_0`…, `continuation`.
    """
    model = LlamaCpp(Path(request["model"]))
    arrays = {
        f"ids_{n}": np.array(model.tokenize(text), dtype=np.int64) for n, text in enumerate(request["texts"])
    }
    arrays |= {f"logits_{n}": model.logits(ids) for n, ids in enumerate(request["inputs"])}
    if request["prompt"]:
        ids = model.continuation(request["prompt"], request["new_tokens"])
        arrays["continuation"] = np.array(ids, dtype=np.int64)
    return arrays


def main() -> int:
    """Answer the request in the file named first into the file named second."""
    try:
        arrays: dict[str, Any] = answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        np.savez(sys.argv[2], **arrays)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
