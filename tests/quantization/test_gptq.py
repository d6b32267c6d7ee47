"""GPTQ against plain rounding, and its four-bit codes against the field's own packing."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

from fettle.quantization.gptq import GROUP, HIGHEST, LOWEST, gptq


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs whose columns go together, as real ones do."""
    torch.manual_seed(0)
    mix = torch.randn(24, 2 * GROUP)
    return torch.randn(48, 2 * GROUP), torch.randn(600, 24) @ mix + 0.1 * torch.randn(600, 2 * GROUP)


def test_outputs_are_nearer_than_by_plain_rounding(problem) -> None:
    weight, x = problem
    plain, found = (gptq(weight, h, torch.float32).dense() for h in (None, x.T @ x))
    assert float(((found - weight) @ x.T).norm()) < 0.5 * float(((plain - weight) @ x.T).norm())


def test_plain_rounding_is_to_the_nearest(problem) -> None:
    weight, _ = problem
    found = gptq(weight, None, torch.float32)
    step = found.scales.repeat_interleave(GROUP, 1)
    assert (found.dense() - weight).abs().le(step * 0.5 * 1.07 + 1e-6).all()  # 7.5 steps are cut to 7 above
    assert found.codes.min() >= LOWEST and found.codes.max() <= HIGHEST


def test_inputs_that_are_always_zero_do_no_harm(problem) -> None:
    weight, x = problem
    x[:, 5] = 0
    assert gptq(weight, x.T @ x, torch.bfloat16).dense().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_group_of_zeros_stays_zero(problem, dtype) -> None:
    """1e-10 is nothing in fp16, and a scale of nothing makes NaN."""
    weight, x = problem
    weight[:, :GROUP] = 0
    found = gptq(weight.to(dtype), x.T @ x, dtype).dense()
    assert (found[:, :GROUP] == 0).all() and found.isfinite().all()


def test_codes_survive_packing(problem) -> None:
    codes = gptq(problem[0], None, torch.float32).codes
    assert torch.equal(unpack_from_int32(pack_to_int32(codes, 4), 4, codes.shape), codes)
