"""ggml's own quantiser, called inside the library of the installed `xllamacpp` wheel.

The wheel is one shared library that holds llama.cpp whole. Its C functions are visible, so weights quantised here
have the very bytes that llama.cpp's own tools would write, and nobody needs a compiler. Importing the wheel as a
Python module is not needed: the library is opened by its path.
"""

import ctypes
import functools
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from fettle.errors import UserError, reason_of

CHUNK_WEIGHTS = 2**20
"""Weights widened to fp32 at once, by each thread: 4 MB."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return llama.cpp as a library; UserError where the wheel is not installed or cannot be opened."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise UserError(
            "Quantized GGUF files need llama.cpp's own routines, which are not installed: pip install xllamacpp "
            "(without it, f32, f16 and bf16 can be written)."
        )
    files = [file for ending in ("*.so", "*.pyd") for file in sorted(Path(spec.origin).parent.glob(ending))]
    try:
        found = ctypes.CDLL(str(files[0]))
        _declare(found)
    except (IndexError, OSError, AttributeError) as error:
        raise UserError(
            f"The installed xllamacpp cannot be used ({reason_of(error)}): pip install --upgrade xllamacpp."
        ) from error
    return found


def _declare(found: ctypes.CDLL) -> None:
    """Tell ctypes the types of the C functions; AttributeError where one is missing."""
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_row_size.argtypes = [ctypes.c_int, size]
    found.ggml_row_size.restype = ctypes.c_size_t
    found.ggml_quantize_init.argtypes = [ctypes.c_int]


def quantize(
    weight: torch.Tensor, kind: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """Return the rows of `weight` (rows, columns) as ggml packs them, uint8 (rows, bytes of a row).

    importance: (columns,) fp32, how much an error in each column counts (llama.cpp's importance matrix).
    Rows are widened to fp32 in small chunks, so that little memory is needed beside the result.
    """
    ggml, (rows, columns) = library(), weight.shape
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance has shape {importance.shape}, the weight {columns} columns")
    ggml.ggml_quantize_init(kind)
    packed = np.empty((rows, ggml.ggml_row_size(kind, columns)), dtype=np.uint8)

    def pack(begin: int, end: int) -> None:
        source = weight[begin:end].float().contiguous()
        target = packed[begin:end]
        weights = None if importance is None else importance.ctypes.data
        written = ggml.ggml_quantize_chunk(
            kind, source.data_ptr(), target.ctypes.data, 0, end - begin, columns, weights
        )
        if written != target.nbytes:
            raise RuntimeError(
                f"ggml wrote {written} bytes of {kind.name} where {target.nbytes} were expected"
            )

    step = max(1, CHUNK_WEIGHTS // columns)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # ctypes lets go of the interpreter's lock
        chunks = [threads.submit(pack, at, min(at + step, rows)) for at in range(0, rows, step)]
        for chunk in chunks:
            chunk.result()
    return packed
