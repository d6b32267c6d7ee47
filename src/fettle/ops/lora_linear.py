"""A frozen linear layer with a low-rank update (Hu et al., 2021, arXiv 2106.09685, equation 3).

    y = x W^T + bias + scale * (x A^T) B^T

Autograd's own graph for this keeps x A^T and a second copy of x where adapters are fp32, and PEFT casts
x up to the adapters' dtype. Here the adapters may be fp32 masters over bf16 weights: they, being small,
are cast to x's dtype. Saved for backward: x and references to W, A, B. Redone in backward: x A^T
(2 * tokens * inputs * rank operations). W and its bias are frozen and get no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The formula above in plain PyTorch: the specification of `lora_linear`."""
    update = F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return F.linear(x, weight, bias) + scale * update


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the layer's output; gradients flow to x, lora_a and lora_b only.

    x: (..., inputs); weight: (outputs, inputs); lora_a: (rank, inputs); lora_b: (outputs, rank).
    """
    output: torch.Tensor = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale)
    return output


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale = scale
        rows = x.reshape(-1, x.shape[-1])
        output = F.linear(rows, weight, bias)
        output.addmm_(F.linear(rows, lora_a.to(x.dtype)), lora_b.to(x.dtype).T, alpha=scale)
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        grad_low = (grad @ b) * ctx.scale  # d loss / d (x A^T), (tokens, rank)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_low, a).view_as(x)
        if ctx.needs_input_grad[3]:
            grad_a = (grad_low.T @ rows).to(lora_a.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = (grad.T @ F.linear(rows, a)).mul_(ctx.scale).to(lora_b.dtype)
        return grad_x, None, None, grad_a, grad_b, None
