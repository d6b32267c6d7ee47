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


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each weight at the nearest step of its group."""
    groups = weight.unflatten(1, (-1, GROUP))
    step = groups.abs().amax(2, keepdim=True) / 7.5
    return ((groups / step).round().clamp(LOWEST, HIGHEST) * step).flatten(1)


def test_outputs_are_nearer_than_by_plain_rounding(problem) -> None:
    weight, x = problem
    plain, found = rounded(weight), gptq(weight, x.T @ x, torch.float32).dense()
    assert float(((found - weight) @ x.T).norm()) < 0.5 * float(((plain - weight) @ x.T).norm())


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest(problem) -> None:
    weight, _ = problem
    found = gptq(weight, torch.eye(weight.shape[1]), torch.float32)
    torch.testing.assert_close(found.dense(), rounded(weight))
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
    weight, x = problem
    codes = gptq(weight, x.T @ x, torch.float32).codes
    assert torch.equal(unpack_from_int32(pack_to_int32(codes, 4), 4, codes.shape), codes)
