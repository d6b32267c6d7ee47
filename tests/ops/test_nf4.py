"""NF4 against bitsandbytes: what it once wrote for a small matrix, and, where it is installed, what it writes now."""

import pytest
import torch

from fettle.ops import nf4
from fettle.ops.nf4 import (
    BLOCK,
    NESTED_BLOCK,
    TABLE,
    Nf4,
    block_scales,
    dynamic_map,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_quantize,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Written by bitsandbytes 0.50 (quantize_4bit, nf4, blocks of 64, compress_statistics) for `golden_matrix`.
GOLDEN_PACKED = (
    "00149e3d4fb6321259e2b1c51edcce028f5e82fdbabdf29070b410eef14b06f8"
    "1fca99be15d2d51eb99acf28f60b410ff015c070a30ecbcdf29f5f930eddef16"
    "d2c3fb632247c05e5fb5210125bf5e50d843347bf4d2e720eeef14b070a30edd"
    "de14c1a1d73100137d191b40edccef29f5f920eccde14c1a1e83111249e2b2d6"
)
GOLDEN_ABSMAX = [1, 46, 207, 255]
GOLDEN_NESTED_ABSMAX = float.fromhex("0x1.7c6p-3")
GOLDEN_OFFSET = float.fromhex("0x1.38dp-2")
GOLDEN_FIRST_COLUMN = ["-0x1.fa8c0cp-4", "-0x1.57e7b2p-3", "0x1.a70b34p-3", "0x1.1aff1p-2"]


def golden_matrix() -> torch.Tensor:
    """Four blocks that look random and are exact in fp32."""
    i = torch.arange(4 * BLOCK)
    return ((i * i * 37 % 1009 - 504) * (1 + i // BLOCK) / 4096).float().view(4, BLOCK)


def matrix(shape: tuple[int, ...], dtype: torch.dtype, size: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape) * size).to(dtype)


# --- bitsandbytes ------------------------------------------------------------------------------------------


def test_quantising_gives_what_bitsandbytes_wrote() -> None:
    found = nf4_quantize(golden_matrix())
    assert bytes(found.packed.flatten().tolist()).hex() == GOLDEN_PACKED
    assert found.absmax.tolist() == GOLDEN_ABSMAX
    assert found.nested_absmax is not None and found.nested_absmax.tolist() == [GOLDEN_NESTED_ABSMAX]
    assert found.offset == GOLDEN_OFFSET


def test_what_bitsandbytes_wrote_is_read_to_its_bits() -> None:
    written = Nf4(
        packed=torch.tensor(list(bytes.fromhex(GOLDEN_PACKED)), dtype=torch.uint8)[:, None],
        absmax=torch.tensor(GOLDEN_ABSMAX, dtype=torch.uint8),
        shape=torch.Size((4, BLOCK)),
        dtype=torch.float32,
        nested_absmax=torch.tensor([GOLDEN_NESTED_ABSMAX]),
        nested_quant_map=dynamic_map(),
        offset=GOLDEN_OFFSET,
    )
    assert nf4_dequantize(written)[:, 0].tolist() == [float.fromhex(x) for x in GOLDEN_FIRST_COLUMN]


def by_bitsandbytes(weight: torch.Tensor) -> tuple[Nf4, torch.Tensor]:
    """The matrix as it quantises it, and that as it dequantises it."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="the oracle is bitsandbytes")
    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    theirs = Nf4(
        packed,
        state.absmax,
        weight.shape,
        weight.dtype,
        state.state2.absmax,
        state.state2.code,
        state.offset.item(),
    )
    return theirs, functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "size"), [((96, 1024), 0.02), ((64, 64), 1e-6), ((250, 128), 30.0)])
def test_agrees_with_bitsandbytes(shape: tuple[int, int], size: float, dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype, size)
    weight[:2] = 0
    theirs, their_values = by_bitsandbytes(weight)
    ours = nf4_quantize(weight)
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.nested_absmax, theirs.nested_absmax) and ours.offset == theirs.offset
    assert torch.equal(ours.nested_quant_map, theirs.nested_quant_map)
    assert torch.equal(nf4_dequantize(theirs), their_values)

    # Its routine for CPUs takes the farther of two neighbours now and then; ours never does.
    steps = (ours.absmax.int() - theirs.absmax.int()).abs()
    assert steps.max() <= 1 and steps.count_nonzero() <= max(2, 0.01 * len(steps))
    absmax = weight.float().view(-1, BLOCK).abs().amax(1)
    rounding = 1e-6 * absmax.max()
    assert ((block_scales(ours) - absmax).abs() <= (block_scales(theirs) - absmax).abs() + rounding).all()


# --- by itself ---------------------------------------------------------------------------------------------


def test_the_nearest_code_is_that_of_a_search_among_the_middles() -> None:
    table = torch.tensor(TABLE)
    middles = (table[1:] + table[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    cells = torch.arange(nf4.CELLS + 1) / (nf4.CELLS / 2) - 1
    numbers = torch.cat((middles, *beside, cells, torch.rand(20_000) * 2 - 1, torch.tensor([-1.0, 0.0, 1.0])))
    assert torch.equal(nf4._nearest(numbers, table).long(), torch.bucketize(numbers, middles))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 21), (65, 33), (7, 64), (300, 65)], ids=str)
def test_a_round_trip_stays_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Half the widest gap of the table times absmax, which itself is a little off: a 255th of its spread."""
    weight = matrix(shape, dtype)
    quantised = nf4_quantize(weight)
    found = nf4_dequantize(quantised)
    assert found.dtype == dtype and found.shape == weight.shape
    assert torch.equal(found, nf4_dequantize_reference(quantised))
    flat = weight.float().flatten()
    absmax = torch.stack([part.abs().max() for part in flat.split(BLOCK)])
    table = torch.tensor(TABLE)
    half_step = (table[1:] - table[:-1]).max() / 2 * absmax
    bound = (half_step + (block_scales(quantised) - absmax).abs()).repeat_interleave(BLOCK)[: len(flat)]
    error = (found.float().flatten() - flat).abs()
    assert (error <= bound + torch.finfo(dtype).eps * absmax.max()).all()
    assert ((block_scales(quantised) - absmax).abs() <= 0.05 * absmax.max()).all()


def test_blocks_of_zeros_stay_zero_beside_others() -> None:
    weight = torch.zeros(8, BLOCK)
    weight[3] = torch.randn(BLOCK)
    found = nf4_dequantize(nf4_quantize(weight))
    assert (found[[0, 1, 2, 4, 5, 6, 7]] == 0).all() and (found[3] != 0).any()
    assert (nf4_dequantize(nf4_quantize(torch.zeros(4, BLOCK))) == 0).all()


def test_matrices_beyond_a_slab_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix((50, 100), torch.bfloat16)
    whole = nf4_quantize(weight)
    values = nf4_dequantize(whole)
    monkeypatch.setattr(nf4, "SLAB", 4 * BLOCK)
    parts = nf4_quantize(weight)
    assert torch.equal(parts.packed, whole.packed) and torch.equal(parts.absmax, whole.absmax)
    assert torch.equal(nf4_dequantize(whole), values)
    even = nf4_quantize(weight[:48].reshape(-1, 96))  # 4,800 weights are 75 blocks
    assert torch.equal(nf4_dequantize(even), nf4_dequantize_reference(even))


def test_absmax_may_be_plain() -> None:
    """As bitsandbytes writes it without double quantisation."""
    weight = golden_matrix()
    absmax = weight.abs().amax(1)
    plain = Nf4(nf4_quantize(weight).packed, absmax, weight.shape, weight.dtype)
    found = nf4_dequantize(plain)
    assert torch.equal(found, nf4_dequantize_reference(plain))
    assert torch.equal(found.abs().amax(1), absmax)


def test_a_weight_takes_about_4_127_bits() -> None:
    quantised = nf4_quantize(matrix((256, 1024), torch.bfloat16))
    assert quantised.nested_absmax is not None
    tensors = (quantised.packed, quantised.absmax, quantised.nested_absmax)
    bits = 8 * sum(t.numel() * t.element_size() for t in tensors) / quantised.shape.numel()
    assert bits == pytest.approx(4 + 8 / BLOCK + 32 / BLOCK / NESTED_BLOCK)
