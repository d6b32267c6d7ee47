"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864, section 3.4.2), half-split layout.

    y1 = x1 cos1 - x2 sin1,  y2 = x2 cos2 + x1 sin2

The transpose of a rotation is the rotation by the negative angle, so backward is forward with the sine negated (and
its halves exchanged, which are equal in every model). Saved for backward: cos and sin, which get no gradient.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import uses_triton


def apply_rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The formula in plain PyTorch: the specification of `apply_rotary`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x with its first `cos.shape[-1]` channels rotated by their positions' angles.

    x: (batch, heads, tokens, head_dim); cos, sin: (batch or 1, tokens, rotary_dim). Channel i is paired
    with channel i + rotary_dim / 2; channels beyond rotary_dim pass unchanged (partial rotary).
    """
    if cos.dtype != x.dtype:  # leave type promotion to PyTorch
        return apply_rotary_reference(x, cos, sin)
    if not torch.is_grad_enabled():
        return _rotate(x, cos, sin, is_inverse=False)
    output: torch.Tensor = _Rotary.apply(x, cos, sin)
    return output


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, is_inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, is_inverse=True), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_inverse: bool) -> torch.Tensor:
    output = torch.empty_like(x)
    rotary_dim = cos.shape[-1]
    output[..., rotary_dim:] = x[..., rotary_dim:]
    if uses_triton(x):
        from fettle.ops.kernels.rotary import rotate

        rotate(x, cos, sin, output, is_inverse=is_inverse)
        return output
    turned = x[..., :rotary_dim]
    first, second = turned.chunk(2, dim=-1)
    sin_first, sin_second = sin.unsqueeze(1).chunk(2, dim=-1)
    sines = (sin_second, -sin_first) if is_inverse else (-sin_first, sin_second)
    exchanged = torch.cat((second, first), dim=-1).mul_(torch.cat(sines, dim=-1))
    torch.mul(turned, cos.unsqueeze(1), out=output[..., :rotary_dim]).add_(exchanged)
    return output
