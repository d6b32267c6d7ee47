"""The Triton kernels of matvec against the dense product in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fettle.ops.dispatch import uses_triton
from fettle.ops.matvec import Norm, matvec, matvec_reference
from fettle.ops.nf4 import Nf4, block_scales, nf4_quantize

AROUND: list[dict[str, Any]] = [
    {},
    {"residual": True},
    {"norm": "plain"},
    {"norm": "offset", "activation_name": "gelu_pytorch_tanh"},
    {"norm": "plain", "activation_name": "silu", "residual": True},
]


@pytest.mark.parametrize("around", AROUND, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(2, 1), (6, 33), (10, 1100)])
def test_plain(kernel_device: str, outputs: int, inputs: int, around: dict[str, Any]) -> None:
    check(torch.randn(outputs, inputs, device=kernel_device), 1, kernel_device, **around)


@pytest.mark.parametrize("around", AROUND, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_nf4_and_what_is_around(kernel_device: str, rows: int, around: dict[str, Any]) -> None:
    check(nf4_quantize(torch.randn(14, 64 * 17, device=kernel_device)), rows, kernel_device, **around)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 64), (5, 64 * 17), (70, 192), (3, 64 * 40)])
def test_nf4(kernel_device: str, outputs: int, inputs: int, rows: int, nested: bool) -> None:
    weight = nf4_quantize(torch.randn(outputs, inputs, device=kernel_device))
    if not nested:
        weight = Nf4(weight.packed, block_scales(weight), weight.shape, weight.dtype)
    check(weight, rows, kernel_device)


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


def check(
    weight: torch.Tensor | Nf4,
    rows: int,
    device: str,
    *,
    norm: str | None = None,
    activation_name: str | None = None,
    residual: bool = False,
) -> None:
    outputs, inputs = weight.shape[0] // (1 if activation_name is None else 2), weight.shape[1]
    x, added = torch.randn(rows, 1, inputs, device=device), torch.randn(rows, 1, outputs, device=device)
    scale = torch.randn(inputs, device=device)
    assert uses_triton(x)

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return function(
            x.to(dtype),
            weight.to(dtype) if isinstance(weight, torch.Tensor) else weight,
            norm=None if norm is None else Norm(scale.to(dtype), 0.01, norm == "offset"),
            activation_name=activation_name,
            residual=added.to(dtype) if residual else None,
        )

    found, expected = run(matvec, torch.float32), run(matvec_reference, torch.float64)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
