"""A frozen linear layer with a low-rank update (Hu et al., 2021, arXiv 2106.09685, equation 3).

    y = x W^T + bias + scale * (x A^T) B^T

Autograd's own graph for this keeps x A^T and a second copy of x where adapters are fp32, and PEFT casts
x up to the adapters' dtype. Here the adapters may be fp32 masters over bf16 weights: they, being small,
are cast to x's dtype. Saved for backward: x and references to W, A, B. Redone in backward: x A^T
(2 * tokens * inputs * rank operations), and the unpacking of W where it is NF4. W and its bias are frozen
and get no gradient.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fettle.ops.nf4 import Nf4, dense


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one layer. a: (rank, inputs); b: (outputs, rank), of any floating-point dtype."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add `scale * (x A^T) B^T` to `output` (T, outputs), in place. x: (T, inputs)."""
        return output.addmm_(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype).T, alpha=self.scale)

    def middle_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """D loss / d (x A^T), (T, rank), given that of the output, (T, outputs)."""
        return (grad @ self.b.to(grad.dtype)) * self.scale

    def add_input_gradient(self, grad_x: torch.Tensor, grad_middle: torch.Tensor) -> torch.Tensor:
        """Add the update's share to `grad_x` (T, inputs), in place."""
        return grad_x.addmm_(grad_middle, self.a.to(grad_x.dtype))

    def gradients(
        self, grad: torch.Tensor, grad_middle: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of A and B, in the dtypes of A and B."""
        grad_b = grad.T @ F.linear(x, self.a.to(x.dtype))
        return (grad_middle.T @ x).to(self.a.dtype), grad_b.mul_(self.scale).to(self.b.dtype)


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
    weight: torch.Tensor | Nf4,
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
        weight: torch.Tensor | Nf4,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.weight, ctx.scale = weight, scale
        rows = x.reshape(-1, x.shape[-1])
        output = F.linear(rows, dense(weight, x.dtype), bias)
        LowRank(lora_a, lora_b, scale).add_to(output, rows)
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, lora_a, lora_b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        update = LowRank(lora_a, lora_b, ctx.scale)
        grad_middle = update.middle_gradient(grad)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = update.add_input_gradient(grad @ dense(ctx.weight, x.dtype), grad_middle).view_as(x)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            grad_a, grad_b = update.gradients(grad, grad_middle, rows)
        return grad_x, None, None, grad_a, grad_b, None
