"""The gate of SwiGLU and GeGLU (Shazeer, 2020, arXiv 2002.05202, equation 6).

Both activations are a(g) = g * sigmoid(z(g)), with z = g for SiLU and, as (1 + tanh u) / 2 = sigmoid(2u),
z = 2 sqrt(2 / pi) (g + 0.044715 g^3) for the tanh approximation of GELU. The derivative, with s = sigmoid(z), is
a' = s + g s (1 - s) z'. Saved for backward: gate and up. Recomputed in backward: a(gate).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import uses_triton

Activation = Callable[[torch.Tensor], torch.Tensor]

ROWS = 256  # rows that the CPU path processes at a time, so that they stay in the cache


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
}
"""The activations that are computed here, by their names in transformers."""


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The formula in plain PyTorch: the specification of `gated_activation`."""
    return activation(gate) * up


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return `activation(gate) * up`. gate, up: (..., intermediate)."""
    name = activation_name_of(activation)
    if name is None or gate.dtype != up.dtype:
        return gated_activation_reference(gate, up, activation)
    if not torch.is_grad_enabled():
        return gated_activation_forward(gate, up, name)
    output: torch.Tensor = _GatedActivation.apply(gate, up, name)
    return output


def activation_name_of(activation: Activation) -> str | None:
    """Return the name of an activation for the functions below; None if they do not support it."""
    return next((name for name, each in ACTIVATIONS.items() if each is activation), None)


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
    return _activate(gate, activation_name).mul_(up)


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up, and the recomputed product `activation(gate) * up`.

    grad, gate, up: (..., intermediate). On a GPU gradients are computed in fp32 and rounded once; on a CPU each of
    PyTorch's own fused passes rounds, as in stock models, in a third of the time of fp32 throughout.
    """
    if uses_triton(gate):
        from fettle.ops.kernels import gated_activation as kernels

        return kernels.gated_activation_backward(grad, gate, up, activation_name)
    outputs = [torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(3)]
    grad_gate, grad_up, product = (t.view(-1, gate.shape[-1]) for t in outputs)
    grad, gate, up = (t.reshape(-1, t.shape[-1]) for t in (grad, gate, up))
    for start in range(0, len(gate), ROWS):
        block = slice(start, start + ROWS)
        gate_rows, up_rows, grad_rows = gate[block], up[block], grad[block]
        activated = _activate(gate_rows, activation_name)
        torch.mul(activated, up_rows, out=product[block])
        torch.mul(activated, grad_rows, out=grad_up[block])
        _activation_gradient(grad_rows * up_rows, gate_rows, activation_name, out=grad_gate[block])
    return outputs[0], outputs[1], outputs[2]


def _activate(gate: torch.Tensor, activation_name: str) -> torch.Tensor:
    return ACTIVATIONS[activation_name](gate)


def _activation_gradient(
    grad: torch.Tensor, gate: torch.Tensor, activation_name: str, *, out: torch.Tensor
) -> None:
    """Write grad * a'(gate) to `out`."""
    if activation_name == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out)
