# mypy: allow-untyped-defs, allow-incomplete-defs
"""One or a few rows times a frozen matrix, bound by the bytes of the matrix: y = x W^T (+ residual).

Plain matrices of one row: a program holds a few outputs and multiplies tile by tile without waiting for other
threads, with one sum over the tile at the end.

NF4 (see `fettle.ops.nf4`): four bits per weight are read, and a weight exists in registers alone. An int32 word holds
eight codes. A code's value comes from another thread of the warp by a shuffle: lane i holds entry i % 16 of the table,
and a shuffle reads the low five bits of its index, so that a shift is all it takes. The sum over a block of 64 weights
is multiplied by its absmax once.

Shapes: M rows of x, N outputs, K inputs, a multiple of 64 for NF4; W is (N, K).
"""

import torch
import triton
import triton.language as tl

from fettle.ops.kernels.nf4 import BLOCK, NESTED_BLOCK

MOST_ROWS = 16  # of x, for NF4
WORDS = BLOCK // 8


@triton.jit
def matvec_kernel(
    x, weight, residual, out, N, K,
    HAS_RESIDUAL: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_n = row < N
    weight += row.to(tl.int64)[:, None] * K
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for first in tl.range(0, K, INPUTS, num_stages=STAGES):
        column = first + tl.arange(0, INPUTS)
        in_k = column < K
        w = tl.load(weight + column[None, :], in_n[:, None] & in_k[None, :], 0.0)
        total += w.to(tl.float32) * tl.load(x + column, in_k, 0.0).to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if HAS_RESIDUAL:  # the product is rounded first, as by a separate addition
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + row, in_n, 0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), in_n)


@triton.jit
def _values(words, table, SHUFFLES: tl.constexpr):
    """Return the fp32 values of the eight codes of each word in three more dimensions of two."""
    if SHUFFLES:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            """{
            .reg .b32 lane, entry, at; .reg .b64 place;
            mov.u32 lane, %laneid; and.b32 lane, lane, 15;
            mad.wide.u32 place, lane, 4, $9; ld.global.nc.b32 entry, [place];
            shr.u32 at, $8, 4; shfl.sync.idx.b32 $0, entry, at, 31, 0xffffffff;
            shfl.sync.idx.b32 $1, entry, $8, 31, 0xffffffff;
            shr.u32 at, $8, 12; shfl.sync.idx.b32 $2, entry, at, 31, 0xffffffff;
            shr.u32 at, $8, 8; shfl.sync.idx.b32 $3, entry, at, 31, 0xffffffff;
            shr.u32 at, $8, 20; shfl.sync.idx.b32 $4, entry, at, 31, 0xffffffff;
            shr.u32 at, $8, 16; shfl.sync.idx.b32 $5, entry, at, 31, 0xffffffff;
            shr.u32 at, $8, 28; shfl.sync.idx.b32 $6, entry, at, 31, 0xffffffff;
            shr.u32 at, $8, 24; shfl.sync.idx.b32 $7, entry, at, 31, 0xffffffff;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,l",
            [words, table.to(tl.int64)],
            (tl.float32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        w0, w1 = tl.load(table + ((words >> 4) & 15)), tl.load(table + (words & 15))
        w2, w3 = tl.load(table + ((words >> 12) & 15)), tl.load(table + ((words >> 8) & 15))
        w4, w5 = tl.load(table + ((words >> 20) & 15)), tl.load(table + ((words >> 16) & 15))
        w6, w7 = tl.load(table + ((words >> 28) & 15)), tl.load(table + ((words >> 24) & 15))
    # The last bit of a weight's place is joined last, and so is the last dimension.
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd)


@triton.jit
def _scales(
    absmax,
    code_book,
    nested_absmax,
    nested_offset,
    block,
    mask,
    IS_NESTED: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Return the absmax of these blocks."""
    scale = tl.load(absmax + block, mask, 0)
    if IS_NESTED:
        nested = tl.load(nested_absmax + block // NESTED, mask, 0.0)
        scale = tl.load(code_book + scale.to(tl.int32)) * nested + nested_offset
    return scale


@triton.jit
def nf4_matvec_kernel(
    x, words, table, absmax, code_book, nested_absmax, nested_offset, residual, out, N, K,
    IS_NESTED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SHUFFLES: tl.constexpr, NESTED: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_n = row < N
    blocks = K // 64
    total = tl.zeros((OUTPUTS, BLOCKS), tl.float32)
    for first in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        block = first + tl.arange(0, BLOCKS)
        mask = in_n[:, None] & (block < blocks)[None, :]
        place = row.to(tl.int64)[:, None] * blocks + block[None, :]
        # Consecutive words in one dimension, so that a warp reads them from one row.
        word = first * 8 + tl.arange(0, BLOCKS * 8)
        in_row = in_n[:, None] & (word < blocks * 8)[None, :]
        codes = tl.load(words + row.to(tl.int64)[:, None] * (blocks * 8) + word[None, :], in_row, 0)
        scale = _scales(absmax, code_book, nested_absmax, nested_offset, place, mask, IS_NESTED, NESTED)
        column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
        inputs = tl.load(x + column, column < K, 0.0).to(tl.float32)
        w = tl.reshape(_values(codes, table, SHUFFLES), (OUTPUTS, BLOCKS, 64))
        total += tl.sum(w * inputs[None, :, :], 2) * scale
    y = tl.sum(total, 1)
    if HAS_RESIDUAL:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + row, in_n, 0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), in_n)


@triton.jit(do_not_specialize=["M", "part"])
def nf4_few_rows_kernel(
    x, words, table, absmax, code_book, nested_absmax, nested_offset, out, M, N, K, part,
    IS_NESTED: tl.constexpr, SHUFFLES: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write this program's part of the sum over K, `part` blocks, to out (parts, M, N)."""
    row, m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    in_n = row < N
    blocks = K // 64
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, blocks)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in range(begin, end, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        mask = in_n[:, None] & (block < end)[None, :]
        place = row.to(tl.int64)[:, None] * blocks + block[None, :]
        # Consecutive words in one dimension, so that a warp reads them from one row.
        word = first * 8 + tl.arange(0, BLOCKS * 8)
        in_row = in_n[:, None] & (word < end * 8)[None, :]
        codes = tl.load(words + row.to(tl.int64)[:, None] * (blocks * 8) + word[None, :], in_row, 0)
        scale = _scales(absmax, code_book, nested_absmax, nested_offset, place, mask, IS_NESTED, NESTED)
        w = tl.reshape(_values(codes, table, SHUFFLES), (OUTPUTS, BLOCKS, 64)) * scale[:, :, None]
        w = tl.reshape(w, (OUTPUTS, BLOCKS * 64)).to(x.dtype.element_ty)
        column = first * 64 + tl.arange(0, BLOCKS * 64)
        seen = (m < M)[None, :] & (column < end * 64)[:, None]
        inputs = tl.load(x + m[None, :] * K + column[:, None], seen, 0.0)
        total = tl.dot(w, inputs, total, input_precision="ieee")
    target = out + (tl.program_id(1) * M + m[None, :]).to(tl.int64) * N + row[:, None]
    tl.store(target, total.to(out.dtype.element_ty), (m < M)[None, :] & in_n[:, None])


PROGRAMS = 528
"""Programs to share one product: four per multiprocessor of an H200."""


def outputs_per_program(outputs: int, most: int) -> int:
    """Return how many of a matrix's outputs a program computes: the largest power of two that gives enough programs."""
    least = 1
    while least < most and outputs // (2 * least) >= PROGRAMS:
        least *= 2
    return least


def matvec(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return weight @ x (+ residual), (N,). x: (K,); weight: (N, K), contiguous."""
    (outputs, inputs), x = weight.shape, x.contiguous()
    out = torch.empty(outputs, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        options = matvec_layout(outputs)
        matvec_kernel[(triton.cdiv(outputs, options["OUTPUTS"]),)](
            *(x, weight, x if residual is None else residual.contiguous(), out, outputs, inputs),
            residual is not None,
            **options,
        )
    return out


def matvec_layout(outputs: int) -> dict[str, int]:
    """Return the constants of `matvec_kernel` and its number of warps."""
    return {"OUTPUTS": outputs_per_program(outputs, 4), "INPUTS": 1024, "STAGES": 3, "num_warps": 4}


def nf4_matvec_layout(outputs: int) -> dict[str, int]:
    """Return the constants of `nf4_matvec_kernel` and its number of warps."""
    return {"OUTPUTS": 4, "BLOCKS": 16, "STAGES": 3, "num_warps": 1}


def nf4_few_rows_layout() -> dict[str, int]:
    """Return the constants of `nf4_few_rows_kernel` and its number of warps."""
    return {"OUTPUTS": 64, "BLOCKS": 2, "num_warps": 4}


Nested = tuple[torch.Tensor, torch.Tensor, float]


def nf4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    outputs: int,
    *,
    nested: Nested | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W^T (+ residual), (M, N), for at most MOST_ROWS rows. x: (M, K), K a multiple of 64.

    packed, absmax, table, nested: see `kernels.nf4.nf4_dequantize`.
    """
    (rows, inputs), x = x.shape, x.contiguous()
    code_book, nested_absmax, nested_offset = nested or (absmax, absmax, 0.0)
    words = packed.view(-1).view(torch.int32)
    matrix = (words, table, absmax, code_book, nested_absmax, float(nested_offset))
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    shuffles = x.is_cuda and torch.version.cuda is not None
    with torch.cuda.device_of(x):
        if rows == 1:
            options = nf4_matvec_layout(outputs)
            nf4_matvec_kernel[(triton.cdiv(outputs, options["OUTPUTS"]),)](
                *(x, *matrix, x if residual is None else residual.contiguous(), out, outputs, inputs),
                *(nested is not None, residual is not None, shuffles, NESTED_BLOCK),
                **options,
            )
            return out
        options = nf4_few_rows_layout()
        programs, blocks = triton.cdiv(outputs, options["OUTPUTS"]), inputs // BLOCK
        parts = max(1, min(PROGRAMS // programs, blocks // (4 * options["BLOCKS"])))
        part = triton.cdiv(triton.cdiv(blocks, parts), options["BLOCKS"]) * options["BLOCKS"]
        parts = triton.cdiv(blocks, part)
        partials = out if parts == 1 else torch.empty(parts, rows, outputs, device=x.device)
        nf4_few_rows_kernel[(programs, parts)](
            *(x, *matrix, partials, rows, outputs, inputs, part),
            *(nested is not None, shuffles, NESTED_BLOCK, MOST_ROWS),
            **options,
        )
    if parts > 1:
        out = partials.sum(0).to(x.dtype)
    return out if residual is None else out.add_(residual)
