# mypy: allow-untyped-defs, allow-incomplete-defs
"""Dequantize NF4 weights on the GPU (Dettmers et al., 2023, arXiv 2305.14314), in bitsandbytes' layout.

    value = table[code] * absmax[i // 64]

A byte holds two codes, the earlier weight's in its high half. With double quantization absmax itself is
one byte per 64 weights: absmax = code_book[byte] * nested_absmax[block // 256] + nested_offset.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax that share one nested absmax
BLOCKS = 32  # blocks per program


@triton.jit
def nf4_dequantize_kernel(
    packed, table, absmax, code_book, nested_absmax, nested_offset, output, size,
    IS_NESTED: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    in_size = block * BLOCK < size
    scale = tl.load(absmax + block, in_size, 0)
    if IS_NESTED:
        nested = tl.load(nested_absmax + block // NESTED_BLOCK, in_size, 0.0)
        scale = tl.load(code_book + scale.to(tl.int32)) * nested + nested_offset

    byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    codes = tl.load(packed + byte, byte * 2 < size, 0).to(tl.int32)
    high, low = tl.load(table + (codes >> 4)) * scale, tl.load(table + (codes & 15)) * scale
    weight = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(high, low).to(output.dtype.element_ty)
    tl.store(output + weight, values, weight < size)


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    nested: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Return the weights, of `shape`, computed in fp32 and rounded once to `dtype`.

    packed: uint8, two weights per byte; table: fp32 (16,); absmax: fp32, one per block of 64 weights, or uint8 codes
    if `nested` = (code_book fp32 (256,), nested_absmax fp32, nested_offset) is given.
    """
    output = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    code_book, nested_absmax, nested_offset = nested or (absmax, absmax, 0.0)
    inputs = [t.contiguous() for t in (packed, table, absmax, code_book, nested_absmax)]
    if size := output.numel():
        with torch.cuda.device_of(packed):
            nf4_dequantize_kernel[(triton.cdiv(size, BLOCK * BLOCKS),)](
                *(*inputs, float(nested_offset), output, size, nested is not None),
                *(BLOCK, NESTED_BLOCK, BLOCKS),
                num_warps=4,
                enable_fp_fusion=False,  # absmax rounded after its product, as in PyTorch and bitsandbytes
            )
    return output
