"""A few rows times a frozen matrix, plain or NF4, for inference, with what surrounds the product in a decoder layer.

    y = act(n W^T) + residual,    n = x / sqrt(mean(x^2) + eps) * norm.weight

Norm, activation and residual are optional. With an activation W has the rows of gate and up, one after the other, and
act(z) = activation(gate) * up. With so few rows the time is that of reading the matrix and of starting kernels: on a
GPU one row takes one launch, and an NF4 matrix is read as it is stored, four bits per weight, and never dequantized to
memory. There neither n nor a weight is rounded to x's dtype; all else is rounded as by separate ops. Sums are in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fettle.ops.dispatch import product_dtype, uses_triton
from fettle.ops.gated_activation import gated_activation_forward
from fettle.ops.nf4 import BLOCK, Nf4, dense, nf4_dequantize, stored
from fettle.ops.rms_norm import rms_norm, rms_norm_reference

MOST_ROWS = 16
"""Of an NF4 product. More rows are cheaper with the dense matrix: dequantizing it is shared by all of them."""


class Norm(NamedTuple):
    """The arguments of `rms_norm`."""

    weight: torch.Tensor
    eps: float
    offset: bool = False


def matvec_reference(
    x: torch.Tensor,
    weight: torch.Tensor | Nf4,
    *,
    norm: Norm | None = None,
    activation_name: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in plain PyTorch: the specification of `matvec`."""
    if norm is not None:
        x = rms_norm_reference(x, norm.weight, norm.eps, offset=norm.offset)
    y = F.linear(x, dense(weight, x.dtype))
    if activation_name is not None:
        gate, up = y.chunk(2, -1)
        y = (F.silu(gate) if activation_name == "silu" else F.gelu(gate, approximate="tanh")) * up
    return y if residual is None else y + residual


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor | Nf4,
    *,
    norm: Norm | None = None,
    activation_name: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the product of x (..., K) with W (N, K), as above: (..., N), or (..., N / 2) with an activation.

    activation_name: "silu" or "gelu_pytorch_tanh". residual: of the result's shape. Any number of rows is right; more
    than one take separate launches.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 and _has_kernel(rows, weight):
        added = None if residual is None else residual.reshape(-1)
        y = _one_row(rows[0], weight, norm, activation_name, added)
        return y.view(*x.shape[:-1], -1)
    if norm is not None:
        rows = rms_norm(rows, norm.weight, norm.eps, offset=norm.offset)
    y = _product(rows, weight)
    if activation_name is not None:
        gate, up = y.chunk(2, -1)
        y = gated_activation_forward(gate, up, activation_name)
    y = y.view(*x.shape[:-1], -1)
    return y if residual is None else y + residual


def _has_kernel(x: torch.Tensor, weight: torch.Tensor | Nf4) -> bool:
    if isinstance(weight, Nf4):
        return x.shape[1] % BLOCK == 0 and uses_triton(x)
    return weight.dtype == x.dtype and weight.is_contiguous() and uses_triton(x)


def _one_row(
    x: torch.Tensor,
    weight: torch.Tensor | Nf4,
    norm: Norm | None,
    activation_name: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    from fettle.ops.kernels import matvec as kernels

    if isinstance(weight, Nf4):
        return kernels.nf4_matvec(x, stored(weight), weight.shape[0], norm, activation_name, residual)
    return kernels.matvec(x, weight, norm, activation_name, residual)


def _product(x: torch.Tensor, weight: torch.Tensor | Nf4) -> torch.Tensor:
    """x: (M, K)."""
    if isinstance(weight, Nf4):
        if 1 <= len(x) <= MOST_ROWS and _has_kernel(x, weight):
            from fettle.ops.kernels import matvec as kernels

            return kernels.nf4_few_rows(x, stored(weight), weight.shape[0])
        weight = nf4_dequantize(weight, product_dtype(x, has_gradient=False))
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)
