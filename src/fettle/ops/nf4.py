"""Weights in NF4 (Dettmers et al., 2023, arXiv 2305.14314, section 3), in bitsandbytes' layout.

    code = nearest entry of TABLE to weight / absmax,    weight ~ TABLE[code] * absmax

absmax is the largest magnitude in a block of 64 consecutive weights. Double quantization stores it, minus its
mean over the matrix, as 8-bit codes in blocks of 256. Two weights share a byte, the first in its high half.
So a weight takes 4.127 bits.

Dequantizing bitsandbytes' matrices gives bit-identical results. Quantizing gives bit-identical codes, nested scales and
offset; of the 8-bit codes of absmax, a few (under 1%) differ, for which bitsandbytes' CPU routine does not choose the
nearest value.
"""

from dataclasses import dataclass
from functools import cache

import torch

from fettle.ops.dispatch import uses_triton

BLOCK = 64
NESTED_BLOCK = 256
CELLS = 1024
SLAB = BLOCK * 4096
"""Weights processed at a time: their fp32 values (1 MB), and the table of all quadruples (1 MB), stay in the cache."""

# fmt: off
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (appendix E)."""


@dataclass(frozen=True, slots=True)
class Nf4:
    """A matrix in NF4.

    packed: (weights / 2, 1) uint8. absmax: (blocks,), fp32, or uint8 codes if it is itself quantized, with
    `nested_absmax` (blocks / 256,) and `nested_quant_map` (256,), both fp32, and `offset`. shape, dtype: of the matrix
    that was quantized.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_quant_map: torch.Tensor | None = None
    offset: float = 0.0


def dense(weight: torch.Tensor | Nf4, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix in `dtype`: a plain one unchanged or converted, an NF4 one dequantized into new memory."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else weight.to(dtype)


# --- quantize ----------------------------------------------------------------------------------------------


@torch.no_grad()
def nf4_quantize(weight: torch.Tensor) -> Nf4:
    """Quantize a matrix of any floating-point dtype, with double quantization. Temporary memory: a few slabs.

    If a weight is NaN or Inf, so is `offset`, and the rest is meaningless.
    """
    flat = weight.detach().reshape(-1)
    packed = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), SLAB):
        codes, largest = _blockwise_codes(flat[start : start + SLAB].float(), BLOCK, _table(flat.device))
        if len(codes) % 2:  # as in bitsandbytes, the last byte's second half is a weight of zero
            codes = torch.cat((codes, codes.new_full((1,), TABLE.index(0.0))))
        packed[start // 2 : start // 2 + len(codes) // 2] = (codes[::2] << 4) | codes[1::2]
        absmax[start // BLOCK : start // BLOCK + len(largest)] = largest
    offset = absmax.mean()
    quant_map = dynamic_map().to(flat.device)
    absmax_codes, nested_absmax = _blockwise_codes(absmax - offset, NESTED_BLOCK, quant_map)
    return Nf4(
        packed[:, None], absmax_codes, weight.shape, weight.dtype, nested_absmax, quant_map, offset.item()
    )


def _blockwise_codes(
    values: torch.Tensor, block: int, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each value's nearest entry of `table`, as uint8, and each block's largest magnitude.

    Ties go to the lower entry. As in bitsandbytes, full blocks are multiplied by the reciprocal of their magnitude,
    and an incomplete last block is divided by it.
    """
    whole = len(values) // block * block
    blocks = values[:whole].view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if whole < len(values):
        largest = values[whole:].abs().max().clamp(min=1e-38)
        absmax, scaled = torch.cat((absmax, largest[None])), torch.cat((scaled, values[whole:] / largest))
    return _nearest(scaled.clamp_(-1, 1), table), absmax


def _nearest(scaled: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the uint8 codes of numbers from -1 to 1: the result of `torch.bucketize` with the midpoints of `table`.

    For NF4 it is 5 times as fast: no cell of width 1 / 512 contains two midpoints, so one lookup and one comparison
    suffice.
    """
    if len(table) > len(TABLE):
        return torch.bucketize(scaled, _middles(table), out_int32=True).to(torch.uint8)
    below, middle = _cells(scaled.device)
    cell = (scaled * (CELLS / 2) + CELLS / 2).int().clamp_(0, CELLS - 1)
    return below.index_select(0, cell) + (scaled > middle.index_select(0, cell))


def _middles(table: torch.Tensor) -> torch.Tensor:
    return (table[:-1] + table[1:]) / 2


@cache
def _cells(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of midpoints below each cell, and the next midpoint."""
    middles = _middles(_table(device))
    below = torch.bucketize(torch.arange(CELLS, device=device) / (CELLS / 2) - 1, middles)
    beyond = torch.cat((middles, middles.new_tensor([torch.inf])))
    return below.to(torch.uint8), beyond[below]


@cache
def dynamic_map() -> torch.Tensor:
    """Return the 256 values, ascending, of an 8-bit number with a dynamic exponent (Dettmers, 2015, arXiv 1511.04561).

    Seven decades up to 1, the i-th divided into 2^i intervals on each side of zero, each represented by its midpoint.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (10 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


# --- dequantize --------------------------------------------------------------------------------------------


def block_scales(weight: Nf4) -> torch.Tensor:
    """Return the absmax of every block, in fp32."""
    if weight.nested_absmax is None or weight.nested_quant_map is None:
        return weight.absmax.float()
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(weight.absmax)]
    return weight.nested_quant_map[weight.absmax.int()] * nested + weight.offset


def nf4_dequantize_reference(weight: Nf4, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute the formula above in plain PyTorch: the specification of `nf4_dequantize`."""
    packed = weight.packed.flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: weight.shape.numel()]
    scales = block_scales(weight).repeat_interleave(BLOCK)[: len(codes)]
    values = _table(packed.device)[codes.int()] * scales
    return values.to(dtype or weight.dtype).view(weight.shape)


@torch.no_grad()
def nf4_dequantize(
    weight: Nf4, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the matrix, computed in fp32 and rounded once to `dtype` (default: the one it was quantized from).

    out: a contiguous matrix of that dtype to write to, on a CPU.
    """
    dtype, device = dtype or weight.dtype, weight.packed.device
    if out is None and uses_triton(torch.empty(0, dtype=dtype, device=device)):
        return _by_kernel(weight, dtype)
    if weight.shape.numel() % BLOCK:
        dense = nf4_dequantize_reference(weight, dtype)
        return dense if out is None else out.copy_(dense)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    flat = weight.packed.view(-1)
    if flat.storage_offset() % 2:  # two bytes are read as one number
        flat = flat.clone()
    packed, scales, blocks = (
        flat.view(torch.int16).view(-1, BLOCK // 4),
        block_scales(weight),
        out.view(-1, BLOCK),
    )
    table, size = _quad_table(device), SLAB // BLOCK
    # Buffers for one slab: pairs of bytes as indices, and the four fp32 values of each as one number of 16 bytes.
    indices = torch.empty(size, BLOCK // 4, dtype=torch.int32, device=device)
    quads = torch.empty(size * BLOCK // 4, dtype=table.dtype, device=device)
    for start in range(0, len(blocks), size):
        part = slice(start, start + size)
        codes = indices[: len(blocks[part])].copy_(packed[part]).add_(2**15).view(-1)
        torch.index_select(table, 0, codes, out=quads[: len(codes)])
        values = quads[: len(codes)].view(torch.float32).view(-1, BLOCK)
        torch.mul(values, scales[part, None], out=blocks[part])
    return out


def _by_kernel(weight: Nf4, dtype: torch.dtype) -> torch.Tensor:
    from fettle.ops.kernels import nf4 as kernels

    packed, absmax, table, nested = stored(weight)
    return kernels.nf4_dequantize(packed, absmax, table, weight.shape, dtype, nested=nested)


def stored(
    weight: Nf4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, float] | None]:
    """Return what the kernels take: packed, absmax, the table, and what absmax is quantized with."""
    nested = None
    if weight.nested_absmax is not None and weight.nested_quant_map is not None:
        nested = (weight.nested_quant_map, weight.nested_absmax, weight.offset)
    return weight.packed, weight.absmax, _table(weight.packed.device), nested


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor(TABLE, device=device)


@cache
def _quad_table(device: torch.device) -> torch.Tensor:
    """Return the four fp32 values of every two bytes, read as a number from -2^15, as one complex128 of 16 bytes."""
    number = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    packed = number.view(torch.uint8).view(-1, 2)
    codes = torch.stack((packed >> 4, packed & 15), 2).flatten(1).int()
    return _table(device)[codes].view(torch.complex128).flatten()
