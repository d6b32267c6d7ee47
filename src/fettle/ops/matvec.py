"""A few rows times a frozen matrix, plain or NF4, for inference: y = x W^T (+ residual).

With so few rows the time is that of reading the matrix. On a GPU an NF4 matrix is read as it is stored, four bits per
weight, and never dequantized to memory; weights are as `nf4_dequantize` gives them but for one row, where they are not
rounded to x's dtype. Sums are in fp32.
"""

import torch
import torch.nn.functional as F

from fettle.ops.dispatch import product_dtype, uses_triton
from fettle.ops.nf4 import BLOCK, Nf4, dense, nf4_dequantize, table_on

MOST_ROWS = 16
"""More rows are cheaper with the dense matrix: dequantizing it is shared by all of them."""


def matvec_reference(
    x: torch.Tensor, weight: torch.Tensor | Nf4, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in plain PyTorch: the specification of `matvec`."""
    y = F.linear(x, dense(weight, x.dtype))
    return y if residual is None else y + residual


def matvec(x: torch.Tensor, weight: torch.Tensor | Nf4, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T, to which `residual` is added after rounding. x: (..., K); W: (N, K); residual: (..., N)."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Nf4):
        is_small = len(rows) in range(1, MOST_ROWS + 1) and x.shape[-1] % BLOCK == 0
        if is_small and uses_triton(x):
            y = _nf4_product(rows, weight, residual)
            return y.view(*x.shape[:-1], weight.shape[0])
        weight = nf4_dequantize(weight, product_dtype(rows, has_gradient=False))
    elif len(rows) == 1 and uses_triton(x) and weight.dtype == x.dtype and weight.is_contiguous():
        from fettle.ops.kernels import matvec as kernels

        return kernels.matvec(rows[0], weight, residual).view(*x.shape[:-1], weight.shape[0])
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if residual is None else y + residual


def _nf4_product(x: torch.Tensor, weight: Nf4, residual: torch.Tensor | None) -> torch.Tensor:
    from fettle.ops.kernels import matvec as kernels

    nested = None
    if weight.nested_absmax is not None and weight.nested_quant_map is not None:
        nested = (weight.nested_quant_map, weight.nested_absmax, weight.offset)
    table, outputs = table_on(x.device), weight.shape[0]
    residual = None if residual is None else residual.reshape(-1, outputs)
    return kernels.nf4_product(
        x, weight.packed, weight.absmax, table, outputs, nested=nested, residual=residual
    )
