"""Weights in NF4 (Dettmers et al., 2023, arXiv 2305.14314, section 3), in bitsandbytes' layout.

    code = nearest entry of TABLE to weight / absmax,    weight ~ TABLE[code] * absmax

absmax is the largest magnitude among 64 weights in a row (a block). Double quantisation stores it, less its
mean over the matrix, as 8-bit codes in blocks of 256. Two weights share a byte, the first in its high half.
A weight so takes 4.127 bits.

What bitsandbytes wrote is read to its bits. What is written here has its codes, nested scales and offset to the
bit; of the 8-bit codes of absmax its routine for CPUs gives a few (under 1%) the neighbour that lies farther.
"""

from dataclasses import dataclass
from functools import cache

import torch

from fettle.ops.dispatch import uses_triton

BLOCK = 64
NESTED_BLOCK = 256
CELLS = 1024
SLAB = BLOCK * 4096
"""Weights worked on at a time: their fp32 values (1 MB) stay in a core's cache."""

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

    packed: (weights / 2, 1) uint8. absmax: (blocks,), uint8 codes where it is itself quantised
    (`nested_absmax` (blocks / 256,) and `nested_quant_map` (256,), both fp32, and `offset` are then given),
    fp32 where it is not. shape, dtype: of the matrix that was quantised.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_quant_map: torch.Tensor | None = None
    offset: float = 0.0


def dense(weight: torch.Tensor | Nf4, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix in `dtype`: a plain one as it is or converted, an NF4 one unpacked into fresh memory."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, Nf4) else weight.to(dtype)


# --- quantise ----------------------------------------------------------------------------------------------


@torch.no_grad()
def nf4_quantize(weight: torch.Tensor) -> Nf4:
    """Quantise a matrix of any floating-point dtype, absmax doubly. Temporary memory: a few slabs.

    A NaN or an infinite weight makes `offset` no finite number, and the rest meaningless.
    """
    flat = weight.detach().reshape(-1)
    packed = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), SLAB):
        codes, largest = _blockwise_codes(flat[start : start + SLAB].float(), BLOCK, _table(flat.device))
        if len(codes) % 2:  # as bitsandbytes: the byte's second half stands for a weight of zero
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

    A tie goes to the lower entry. As in bitsandbytes, whole blocks are multiplied by the reciprocal of their
    magnitude and a last part of one is divided by it.
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
    """The uint8 codes of numbers from -1 to 1: what `torch.bucketize` gives for the table's middles.

    For NF4 5 times as fast: no cell of 1 / 512 holds two middles, so that a look-up and a comparison suffice.
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
    """How many of the table's middles lie below each cell, and the next one."""
    middles = _middles(_table(device))
    below = torch.bucketize(torch.arange(CELLS, device=device) / (CELLS / 2) - 1, middles)
    beyond = torch.cat((middles, middles.new_tensor([torch.inf])))
    return below.to(torch.uint8), beyond[below]


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values, ascending, of an 8-bit number with a dynamic exponent (Dettmers, 2015, arXiv 1511.04561).

    Seven decades up to 1, the i-th cut into 2^i parts on each side of zero, each represented by its middle.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (10 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


# --- and back ----------------------------------------------------------------------------------------------


def block_scales(weight: Nf4) -> torch.Tensor:
    """The absmax of every block, in fp32."""
    if weight.nested_absmax is None or weight.nested_quant_map is None:
        return weight.absmax.float()
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(weight.absmax)]
    return weight.nested_quant_map[weight.absmax.int()] * nested + weight.offset


def nf4_dequantize_reference(weight: Nf4, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The formula above in plain PyTorch: the specification of `nf4_dequantize`."""
    packed = weight.packed.flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: weight.shape.numel()]
    scales = block_scales(weight).repeat_interleave(BLOCK)[: len(codes)]
    values = _table(packed.device)[codes.int()] * scales
    return values.to(dtype or weight.dtype).view(weight.shape)


@torch.no_grad()
def nf4_dequantize(
    weight: Nf4, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the matrix, computed in fp32 and rounded once to `dtype` (default: the one it was quantised from).

    out: a contiguous matrix of that dtype to put it in, on a CPU.
    """
    dtype, device = dtype or weight.dtype, weight.packed.device
    if out is None and uses_triton(torch.empty(0, dtype=dtype, device=device)):
        return _by_kernel(weight, dtype)
    if weight.shape.numel() % BLOCK:
        dense = nf4_dequantize_reference(weight, dtype)
        return dense if out is None else out.copy_(dense)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    packed, scales, blocks = weight.packed.view(-1, BLOCK // 2), block_scales(weight), out.view(-1, BLOCK)
    table, size = _pair_table(device), SLAB // BLOCK
    bytes_at_work = torch.empty(size, BLOCK // 2, dtype=torch.int32, device=device)
    pairs = torch.empty(size * BLOCK // 2, dtype=table.dtype, device=device)
    for start in range(0, len(blocks), size):
        part = slice(start, start + size)
        codes = bytes_at_work[: len(blocks[part])].copy_(packed[part]).view(-1)
        torch.index_select(table, 0, codes, out=pairs[: len(codes)])
        values = pairs[: len(codes)].view(torch.float32).view(-1, BLOCK)
        torch.mul(values, scales[part, None], out=blocks[part])
    return out


def _by_kernel(weight: Nf4, dtype: torch.dtype) -> torch.Tensor:
    from fettle.ops.kernels import nf4 as kernels

    nested = None
    if weight.nested_absmax is not None and weight.nested_quant_map is not None:
        nested = (weight.nested_quant_map, weight.nested_absmax, weight.offset)
    table = _table(weight.packed.device)
    return kernels.nf4_dequantize(weight.packed, weight.absmax, table, weight.shape, dtype, nested=nested)


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor(TABLE, device=device)


@cache
def _pair_table(device: torch.device) -> torch.Tensor:
    """The two fp32 values that a byte stands for, side by side in an int64: one look-up for two weights."""
    codes = torch.arange(256, device=device)
    return _table(device)[torch.stack((codes >> 4, codes & 15), 1)].view(torch.int64).flatten()
