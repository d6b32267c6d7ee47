"""The Triton kernels of matvec against the dense product in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fettle.ops.dispatch import uses_triton
from fettle.ops.matvec import matvec, matvec_reference
from fettle.ops.nf4 import Nf4, block_scales, nf4_quantize


def test_the_kernels_agree_in_the_interpreter(run_interpreted: Callable[[str], None]) -> None:
    run_interpreted(__file__)


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (5, 1100)])
def test_plain(kernel_device: str, outputs: int, inputs: int, has_residual: bool) -> None:
    weight = torch.randn(outputs, inputs, device=kernel_device)
    check(weight, 1, kernel_device, has_residual)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (5, 64 * 17), (70, 192), (3, 64 * 40)])
def test_nf4(kernel_device: str, outputs: int, inputs: int, rows: int, nested: bool) -> None:
    weight = nf4_quantize(torch.randn(outputs, inputs, device=kernel_device))
    if not nested:
        weight = Nf4(weight.packed, block_scales(weight), weight.shape, weight.dtype)
    check(weight, rows, kernel_device, has_residual=rows != 2)


def test_nf4_uses_its_scales(kernel_device: str) -> None:
    """NaN in an absmax reaches exactly the output of its row."""
    weight = nf4_quantize(torch.randn(9, 128, device=kernel_device))
    scales = block_scales(weight)
    scales[7] = torch.nan
    weight = replace(weight, absmax=scales, nested_absmax=None, nested_quant_map=None)
    for rows in (1, 3):
        found = matvec(torch.randn(rows, 128, device=kernel_device), weight)
        assert found[:, 3].isnan().all()
        assert int(found.isnan().sum()) == rows


def check(weight: torch.Tensor | Nf4, rows: int, device: str, has_residual: bool) -> None:
    outputs, inputs = weight.shape
    x, residual = torch.randn(rows, 1, inputs, device=device), torch.randn(rows, 1, outputs, device=device)
    added = residual if has_residual else None
    assert uses_triton(x)
    found = matvec(x, weight, added)
    wide = weight.double() if isinstance(weight, torch.Tensor) else weight
    expected = matvec_reference(x.double(), wide, None if added is None else added.double())
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
