"""A few rows times a frozen matrix on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from fettle.ops.matvec import matvec
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
        torch.testing.assert_close(matvec(x, weight, residual).double(), expected + residual, **tolerance)
