"""ggml's own quantizer, from llama.cpp's library: bit-identical to the output of llama.cpp's tools."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gguf import GGMLQuantizationType

from fettle.engine.llama_cpp.library import library

CHUNK_WEIGHTS = 2**20
"""Weights converted to fp32 at a time, per thread: 4 MB."""


def quantize(
    weight: torch.Tensor, kind: GGMLQuantizationType, importance: np.ndarray | None = None
) -> np.ndarray:
    """Return the rows of `weight` (rows, columns) in ggml's format, uint8 (rows, bytes per row).

    importance: (columns,) fp32, the weight of errors in each column (llama.cpp's importance matrix).
    Rows are converted to fp32 in small chunks, so that little memory is needed besides the result.
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
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # ctypes releases the GIL
        chunks = [threads.submit(pack, at, min(at + step, rows)) for at in range(0, rows, step)]
        for chunk in chunks:
            chunk.result()
    return packed
