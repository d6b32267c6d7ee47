"""Root-mean-square normalization (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4).

    y = n * weight,  n = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)

With d = grad * weight: grad_x = rstd * (d - n * mean(d * n)), grad_weight = sum over rows of grad * n.
Saved for backward: x, weight and rstd (one fp32 number per row). Recomputed in backward: n.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import uses_triton

ROWS = 256  # rows that the CPU path processes at a time, which bounds its fp32 temporaries


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: bool = False
) -> torch.Tensor:
    """The formula in plain PyTorch: the specification of `rms_norm`."""
    x_fp32 = x.float()
    normalized = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normalized * (1.0 + weight.float())).to(x.dtype)
    return weight * normalized.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: bool = False) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32 and returned in x's dtype.

    x: (..., hidden); weight: (hidden,). With `offset` the weight is stored as its difference from one and
    the product is computed before rounding (Gemma); without, the normalized x is rounded first (Llama).
    """
    if weight.dtype != x.dtype:  # leave type promotion to PyTorch
        return rms_norm_reference(x, weight, eps, offset=offset)
    if not torch.is_grad_enabled():
        return _normalize(x, weight, eps, offset)[0]
    output: torch.Tensor = _RMSNorm.apply(x, weight, eps, offset)
    return output


def _normalize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, shaped as x, and rstd, (rows,)."""
    rows = x.reshape(-1, x.shape[-1])
    if uses_triton(x):
        from fettle.ops.kernels.rms_norm import rms_norm_forward

        output, rstd = rms_norm_forward(rows, weight, eps, offset)
    else:
        output, rstd = _forward(rows, weight, eps, offset)
    return output.view(x.shape), rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool) -> torch.Tensor:
        output, rstd = _normalize(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        arguments = (grad, rows, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
        if uses_triton(x):
            from fettle.ops.kernels.rms_norm import rms_norm_backward

            grad_x, grad_weight = rms_norm_backward(*arguments)
        else:
            grad_x, grad_weight = _backward(*arguments)
        return grad_x.view(x.shape), grad_weight, None, None


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    for start in range(0, len(x), ROWS):
        block = slice(start, start + ROWS)
        x_fp32 = x[block].float()
        rstd[block] = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
        normalized = x_fp32 * rstd[block]
        if offset:
            output[block] = normalized.mul_(1.0 + weight.float())
        else:
            torch.mul(weight, normalized.to(x.dtype), out=output[block])
    return output, rstd


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: bool,
    needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = weight.float() + 1.0 if offset else weight.float()
    grad_weight = torch.zeros_like(scale) if needs_weight_grad else None
    for start in range(0, len(x), ROWS):
        block = slice(start, start + ROWS)
        normalized, grad_fp32 = x[block].float() * rstd[block], grad[block].float()
        if grad_weight is not None:
            grad_weight += (grad_fp32 * normalized).sum(0)
        grad_normalized = grad_fp32 * scale
        mean = (grad_normalized * normalized).mean(-1, keepdim=True)
        grad_x[block] = grad_normalized.sub_(normalized.mul_(mean)).mul_(rstd[block])
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)
