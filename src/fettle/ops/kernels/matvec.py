# mypy: allow-untyped-defs, allow-incomplete-defs
"""One or a few rows times a frozen matrix, bound by the bytes of the matrix; what comes before and after in the same
launch. See `fettle.ops.matvec` for the formula.

Plain matrices of one row: a program holds a few outputs and multiplies tile by tile without waiting for other
threads, with one sum over the tile at the end. A norm's 1 / sqrt(mean square) multiplies the sums, so that it is
computed on the way.

NF4 (see `fettle.ops.nf4`): four bits per weight are read, and a weight exists in registers alone. An int32 word holds
eight codes. A code's value comes from another thread of the warp by a shuffle: lane i holds entry i % 16 of the table,
and a shuffle reads the low five bits of its index, so that a shift is all it takes. The sum over a block of 64 weights
is multiplied by its absmax once.

Shapes: M rows of x, N outputs, K inputs, a multiple of 64 for NF4; W is (N, K).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fettle.ops.kernels.gated_activation import _sigmoid
from fettle.ops.kernels.nf4 import BLOCK, NESTED_BLOCK

MOST_ROWS = 16  # of x, for NF4


@triton.jit
def _normed(inputs, norm, column, seen, OFFSET: tl.constexpr):
    """Return the inputs times the norm's weight; their 1 / sqrt(mean square) is left to `_finish`."""
    scale = tl.load(norm + column, seen, 0.0).to(tl.float32)
    return inputs * (scale + 1.0) if OFFSET else inputs * scale


@triton.jit
def _finish(
    y, up, squares, K, eps, residual, out, row, in_n,
    HAS_NORM: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store the outputs `row`: normed, gated, added to. Each step is rounded, as separate ops would."""
    dtype = out.dtype.element_ty
    if HAS_NORM:
        inverse = tl.rsqrt(squares / K + eps)
        y *= inverse
        up *= inverse
    if GATE > 0:
        y, up = y.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        y = (y * _sigmoid(y, GATE == 1)).to(dtype).to(tl.float32) * up
    if HAS_RESIDUAL:
        y = y.to(dtype).to(tl.float32) + tl.load(residual + row, in_n, 0.0).to(tl.float32)
    tl.store(out + row, y.to(dtype), in_n)


@triton.jit
def matvec_kernel(
    x, norm, weight, residual, out, N, K, eps,
    HAS_NORM: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_n = row < N
    weight += row.to(tl.int64)[:, None] * K
    ups = weight + tl.cast(N, tl.int64) * K
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    up = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    squares = tl.zeros((INPUTS,), tl.float32)
    for first in tl.range(0, K, INPUTS, num_stages=STAGES):
        column = first + tl.arange(0, INPUTS)
        in_k = column < K
        mask = in_n[:, None] & in_k[None, :]
        inputs = tl.load(x + column, in_k, 0.0).to(tl.float32)
        if HAS_NORM:
            squares += inputs * inputs
            inputs = _normed(inputs, norm, column, in_k, OFFSET)
        total += tl.load(weight + column[None, :], mask, 0.0).to(tl.float32) * inputs[None, :]
        if GATE > 0:
            up += tl.load(ups + column[None, :], mask, 0.0).to(tl.float32) * inputs[None, :]
    _finish(
        tl.sum(total, 1), tl.sum(up, 1), tl.sum(squares, 0), K, eps, residual, out, row, in_n,
        HAS_NORM, GATE, HAS_RESIDUAL,
    )  # fmt: skip


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
    scale = tl.load(absmax + block) if mask is None else tl.load(absmax + block, mask, 0)
    if IS_NESTED:
        place = nested_absmax + block // NESTED
        nested = tl.load(place) if mask is None else tl.load(place, mask, 0.0)
        scale = tl.load(code_book + scale.to(tl.int32)) * nested + nested_offset
    return scale


@triton.jit
def _nf4_sums(
    inputs, words, table, absmax, code_book, nested_absmax, nested_offset, row, in_n, first, blocks,
    IS_NESTED: tl.constexpr, SHUFFLES: tl.constexpr, NESTED: tl.constexpr, IS_EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the sums of each block from `first` on, (OUTPUTS, BLOCKS). inputs: (BLOCKS, 64)."""
    block = first + tl.arange(0, BLOCKS)
    place = row.to(tl.int64)[:, None] * blocks + block[None, :]
    # Consecutive words in one dimension, so that a warp reads them from one row.
    word = first * 8 + tl.arange(0, BLOCKS * 8)
    source = words + row.to(tl.int64)[:, None] * (blocks * 8) + word[None, :]
    if IS_EVEN:
        codes = tl.load(source)
        mask = None
    else:
        codes = tl.load(source, in_n[:, None] & (word < blocks * 8)[None, :], 0)
        mask = in_n[:, None] & (block < blocks)[None, :]
    scale = _scales(absmax, code_book, nested_absmax, nested_offset, place, mask, IS_NESTED, NESTED)
    w = tl.reshape(_values(codes, table, SHUFFLES), (OUTPUTS, BLOCKS, 64))
    return tl.sum(w * inputs[None, :, :], 2) * scale


@triton.jit
def nf4_matvec_kernel(
    x, norm, words, table, absmax, code_book, nested_absmax, nested_offset, residual, out, N, K, eps,
    IS_NESTED: tl.constexpr, SHUFFLES: tl.constexpr, NESTED: tl.constexpr, IS_EVEN: tl.constexpr,
    HAS_NORM: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """IS_EVEN: the programs' outputs and blocks divide N and K, so that nothing has to be masked."""
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_n = row < N
    blocks = K // 64
    total = tl.zeros((OUTPUTS, BLOCKS), tl.float32)
    up = tl.zeros((OUTPUTS, BLOCKS), tl.float32)
    squares = tl.zeros((BLOCKS, 64), tl.float32)
    for first in tl.range(0, blocks, BLOCKS, num_stages=STAGES):
        column = (first + tl.arange(0, BLOCKS))[:, None] * 64 + tl.arange(0, 64)[None, :]
        in_k = column >= 0 if IS_EVEN else column < K
        inputs = (
            tl.load(x + column).to(tl.float32) if IS_EVEN else tl.load(x + column, in_k, 0.0).to(tl.float32)
        )
        if HAS_NORM:
            squares += inputs * inputs
            inputs = _normed(inputs, norm, column, in_k, OFFSET)
        total += _nf4_sums(
            inputs, words, table, absmax, code_book, nested_absmax, nested_offset, row, in_n, first, blocks,
            IS_NESTED, SHUFFLES, NESTED, IS_EVEN, OUTPUTS, BLOCKS,
        )  # fmt: skip
        if GATE > 0:
            up += _nf4_sums(
                inputs, words, table, absmax, code_book, nested_absmax, nested_offset, row + N, in_n, first,
                blocks, IS_NESTED, SHUFFLES, NESTED, IS_EVEN, OUTPUTS, BLOCKS,
            )  # fmt: skip
    _finish(
        tl.sum(total, 1), tl.sum(up, 1), tl.sum(squares), K, eps, residual, out, row, in_n,
        HAS_NORM, GATE, HAS_RESIDUAL,
    )  # fmt: skip


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

GATES = {None: 0, "silu": 1, "gelu_pytorch_tanh": 2}
Scales = tuple[torch.Tensor, float, bool]
"""A norm: its weight, eps, and whether the weight is stored as its difference from one."""

Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, float] | None]
"""An NF4 matrix: packed, absmax, table and nested, see `kernels.nf4.nf4_dequantize`."""


def matvec_layout(outputs: int, is_gated: bool, inputs: int) -> dict[str, int]:
    """Return the constants of `matvec_kernel` that depend on the matrix, and its number of warps."""
    rows = 4 if outputs >= 4 * PROGRAMS else 2
    return {"OUTPUTS": rows // (1 + is_gated), "INPUTS": 1024, "STAGES": 3, "num_warps": 4}


def nf4_matvec_layout(outputs: int, is_gated: bool, inputs: int) -> dict[str, int]:
    """Return the constants of `nf4_matvec_kernel` that depend on the matrix, and its number of warps.

    The best of 36 on one H200 for Phi-3.5's matrices: (9216, 3072) 10.0 us, (16384, 3072) 15.3, (3072, 8192) 11.1,
    (3072, 3072) 5.4.
    """
    rows = 4 if outputs >= 8 * PROGRAMS else 2
    blocks = 16 if inputs % (16 * BLOCK) == 0 else 8
    return {"OUTPUTS": max(1, rows // (1 + is_gated)), "BLOCKS": blocks, "STAGES": 1, "num_warps": 1}


def nf4_few_rows_layout() -> dict[str, int]:
    """Return the constants of `nf4_few_rows_kernel` and its number of warps."""
    return {"OUTPUTS": 64, "BLOCKS": 2, "num_warps": 4}


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: Scales | None,
    activation_name: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product with a plain matrix, see `fettle.ops.matvec`. x: (K,); weight: (N or 2 N, K), contiguous."""
    outputs, inputs = weight.shape
    return _launch(
        matvec_kernel, matvec_layout, (weight,), (outputs, inputs), {}, x, norm, activation_name, residual
    )


def nf4_matvec(
    x: torch.Tensor,
    stored: Stored,
    outputs: int,
    norm: Scales | None,
    activation_name: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product with an NF4 matrix of `outputs` rows. x: (K,), K a multiple of 64."""
    matrix, flags = _nf4_arguments(x, stored)
    shape = (outputs, len(x))
    return _launch(
        nf4_matvec_kernel, nf4_matvec_layout, matrix, shape, flags, x, norm, activation_name, residual
    )


def _launch(
    kernel: triton.JITFunction,
    layout: Callable[[int, bool, int], dict[str, int]],
    matrix: tuple[torch.Tensor | float, ...],
    shape: tuple[int, int],
    flags: dict[str, int],
    x: torch.Tensor,
    norm: Scales | None,
    activation_name: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    is_gated = activation_name is not None
    outputs, inputs = shape[0] // (1 + is_gated), shape[1]
    out = torch.empty(outputs, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    norm_weight, eps, offset = norm or (x, 0.0, False)
    options = layout(outputs, is_gated, inputs)
    if "BLOCKS" in options:
        is_even = inputs % (BLOCK * options["BLOCKS"]) == 0 and outputs % options["OUTPUTS"] == 0
        flags = {**flags, "IS_EVEN": is_even}
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(outputs, options["OUTPUTS"]),)](
            *(x, norm_weight, *matrix, x if residual is None else residual.contiguous(), out),
            *(outputs, inputs, eps),
            HAS_NORM=norm is not None,
            OFFSET=offset,
            GATE=GATES[activation_name],
            HAS_RESIDUAL=residual is not None,
            **flags,
            **options,
        )
    return out


def nf4_few_rows(x: torch.Tensor, stored: Stored, outputs: int) -> torch.Tensor:
    """Return x W^T, (M, outputs), for at most MOST_ROWS rows. x: (M, K), K a multiple of 64."""
    (rows, inputs), x = x.shape, x.contiguous()
    matrix, flags = _nf4_arguments(x, stored)
    options = nf4_few_rows_layout()
    programs, blocks = triton.cdiv(outputs, options["OUTPUTS"]), inputs // BLOCK
    parts = max(1, min(PROGRAMS // programs, blocks // (4 * options["BLOCKS"])))
    part = triton.cdiv(triton.cdiv(blocks, parts), options["BLOCKS"]) * options["BLOCKS"]
    parts = triton.cdiv(blocks, part)
    dtype = x.dtype if parts == 1 else torch.float32
    partials = torch.empty(parts, rows, outputs, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        nf4_few_rows_kernel[(programs, parts)](
            *(x, *matrix, partials, rows, outputs, inputs, part), ROWS=MOST_ROWS, **flags, **options
        )
    return partials[0] if parts == 1 else partials.sum(0).to(x.dtype)


def _nf4_arguments(
    x: torch.Tensor, stored: Stored
) -> tuple[tuple[torch.Tensor | float, ...], dict[str, int]]:
    packed, absmax, table, nested = stored
    code_book, nested_absmax, offset = nested or (absmax, absmax, 0.0)
    words = packed.view(-1).view(torch.int32)
    shuffles = x.is_cuda and torch.version.cuda is not None
    flags = {"IS_NESTED": nested is not None, "SHUFFLES": shuffles, "NESTED": NESTED_BLOCK}
    return (words, table, absmax, code_book, nested_absmax, float(offset)), flags
