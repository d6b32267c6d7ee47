"""ggml's own quantiser, inside llama.cpp's library: weights get the very bytes that its own tools would write."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf import GGMLQuantizationType

from fettle.engine.llama_cpp.library import library

CHUNK_WEIGHTS = 2**20
"""Weights widened to fp32 at once, by each thread: 4 MB."""


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
