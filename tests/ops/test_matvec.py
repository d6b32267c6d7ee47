"""A few rows times a frozen matrix on a CPU, with what surrounds the product in a decoder layer."""

import pytest
import torch
import torch.nn.functional as F

from fettle.ops.matvec import Norm, matvec, matvec_reference
from fettle.ops.nf4 import nf4_dequantize, nf4_quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("inputs", [64, 50])
def test_matvec(rows: int, inputs: int, dtype: torch.dtype) -> None:
    x, plain = torch.randn(rows, 1, inputs, dtype=dtype), torch.randn(9, inputs, dtype=dtype)
    residual = torch.randn(rows, 1, 9, dtype=dtype)
    packed = nf4_quantize(plain)
    for weight, matrix in ((plain, plain), (packed, nf4_dequantize(packed, torch.float32))):
        expected = F.linear(x.double(), matrix.double())
        tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.2}
        found = matvec(x, weight)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **tolerance)
        torch.testing.assert_close(
            matvec(x, weight, residual=residual).double(), expected + residual, **tolerance
        )


@pytest.mark.parametrize("activation_name", [None, "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("offset", [False, True])
def test_what_is_around(offset: bool, activation_name: str | None) -> None:
    x, weight, scale = torch.randn(3, 2, 50), torch.randn(8, 50), torch.randn(50)
    residual = torch.randn(3, 2, 8 if activation_name is None else 4)
    found = matvec(
        x, weight, norm=Norm(scale, 0.01, offset), activation_name=activation_name, residual=residual
    )
    expected = matvec_reference(
        x.double(),
        weight.double(),
        norm=Norm(scale.double(), 0.01, offset),
        activation_name=activation_name,
        residual=residual.double(),
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
