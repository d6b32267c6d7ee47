"""The gate of SwiGLU and GeGLU (Shazeer, 2020, arXiv 2002.05202, equation 6).

Both activations are a(g) = g * sigmoid(z(g)), with z = g for SiLU and, as (1 + tanh u) / 2 = sigmoid(2u),
z = 2 sqrt(2 / pi) (g + 0.044715 g^3) for the tanh form of GELU. Their slope, with s = sigmoid(z), is
a' = s + g s (1 - s) z'. Saved for backward: gate and up. Redone in backward: a(gate).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import uses_triton

Activation = Callable[[torch.Tensor], torch.Tensor]

ROWS = 256  # the CPU path's fp32 temporaries are this many rows high
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715

# Class names, because those of transformers are not imported here.
CLASSES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_pytorch_tanh"}


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The formula in plain PyTorch: the specification of `gated_activation`."""
    return activation(gate) * up


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return `activation(gate) * up`. gate, up: (..., intermediate)."""
    name = activation_name_of(activation)
    if name is None or gate.dtype != up.dtype:
        return gated_activation_reference(gate, up, activation)
    output: torch.Tensor = _GatedActivation.apply(gate, up, name)
    return output


def activation_name_of(activation: Activation) -> str | None:
    """The name that the functions below know an activation by; None for one they do not know."""
    return "silu" if activation is F.silu else CLASSES.get(type(activation).__name__)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation_name: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation_name = activation_name
        return gated_activation_forward(gate, up, activation_name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up, _ = gated_activation_backward(grads[0], gate, up, ctx.activation_name)
        return grad_gate, grad_up, None


def gated_activation_forward(gate: torch.Tensor, up: torch.Tensor, activation_name: str) -> torch.Tensor:
    """Return `activation(gate) * up`, the activation rounded before the product as in stock models.

    activation_name: "silu" or "gelu_pytorch_tanh".
    """
    if uses_triton(gate):
        from fettle.ops.kernels import gated_activation as kernels

        return kernels.gated_activation_forward(gate, up, activation_name)
    activated = F.silu(gate) if activation_name == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up, and the product `activation(gate) * up` once more.

    grad, gate, up: (..., intermediate). Gradients are computed in at least fp32 and rounded once.
    """
    if uses_triton(gate):
        from fettle.ops.kernels import gated_activation as kernels

        return kernels.gated_activation_backward(grad, gate, up, activation_name)
    outputs = [torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(3)]
    grad_gate, grad_up, product = (t.view(-1, gate.shape[-1]) for t in outputs)
    grad, gate, up = (t.reshape(-1, t.shape[-1]) for t in (grad, gate, up))
    wide = torch.promote_types(gate.dtype, torch.float32)
    for start in range(0, len(gate), ROWS):
        block = slice(start, start + ROWS)
        activated, slope = _activation_and_slope(gate[block].to(wide), activation_name)
        product[block] = activated.to(gate.dtype) * up[block]
        grad_wide = grad[block].to(wide)
        grad_up[block] = activated.mul_(grad_wide)
        grad_gate[block] = slope.mul_(grad_wide).mul_(up[block])
    return outputs[0], outputs[1], outputs[2]


def _activation_and_slope(gate: torch.Tensor, activation_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if activation_name == "silu":
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        return activated, sigmoid + activated * (1 - sigmoid)
    square = gate * gate
    sigmoid = torch.sigmoid(SLOPE * gate * (1 + CUBIC * square))
    activated = gate * sigmoid
    return activated, sigmoid + activated * (1 - sigmoid) * SLOPE * (1 + 3 * CUBIC * square)
