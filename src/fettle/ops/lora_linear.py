"""Frozen linear layers with low-rank updates (Hu et al., 2021, arXiv 2106.09685, equation 3).

    y = x W^T + bias + scale * (x A^T) B^T

With fp32 adapters, autograd's own graph keeps a second copy of x, as PEFT casts x up to the adapters' dtype. Here fp32
adapters over bf16 weights, which are small, are cast to x's dtype instead. Products run in that dtype or, if the CPU
would emulate it, in fp32 (`dispatch.product_dtype`). Layers with a shared input (query, key and value) share products:
one x A^T for all A, and one sum for the gradient of x.

Saved for backward: x, the middles x A^T (T x rank each) and references to W, A, B. Recomputed in backward: the
dequantized W if it is NF4. W and its bias are frozen and get no gradient. With G the gradient of y and
M = scale * G B (T, rank):

    grad_x = G W + M A,    grad_A = M^T x,    grad_B = scale * G^T (x A^T)

Shapes: T tokens; inputs, outputs and rank of each layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import product_dtype
from fettle.ops.matvec import MOST_ROWS, matvec
from fettle.ops.nf4 import Nf4
from fettle.ops.scratch import dense_weights


@dataclass(frozen=True, slots=True)
class LowRank:
    """The low-rank update of one layer. a: (rank, inputs); b: (outputs, rank), of any floating-point dtype."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def add_to(self, output: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        """Add `scale * middle B^T` to `output` (T, outputs) in place. middle: x A^T, (T, rank)."""
        return output.addmm_(middle, self.b.to(output.dtype).T, alpha=self.scale)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """x A^T, (T, rank)."""
        return F.linear(x, self.a.to(x.dtype))

    def middle_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """d loss / d (x A^T) = scale * grad B, (T, rank), for the output's gradient `grad` (T, outputs)."""
        product = grad @ self.b.to(grad.dtype)
        return product if self.scale == 1 else product.mul_(self.scale)

    def add_input_gradient(self, grad_x: torch.Tensor, grad_middle: torch.Tensor) -> torch.Tensor:
        """Add the update's share, grad_middle A, to `grad_x` (T, inputs) in place."""
        return grad_x.addmm_(grad_middle, self.a.to(grad_x.dtype))

    def b_gradient(self, grad: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        """scale * grad^T middle, (outputs, rank), in B's dtype."""
        grad_b = (grad.T @ middle).to(self.b.dtype)
        return grad_b if self.scale == 1 else grad_b.mul_(self.scale)


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and its low-rank update, if any. weight: (outputs, inputs)."""

    weight: torch.Tensor | Nf4
    update: LowRank | None
    bias: torch.Tensor | None = None


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute the formula above in plain PyTorch: the specification of `lora_linear`."""
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
    """Return the layer's output (..., outputs); only x, lora_a and lora_b get gradients.

    x: (..., inputs); weight: (outputs, inputs); lora_a: (rank, inputs); lora_b: (outputs, rank).
    """
    (output,) = lora_linears(x, [Projection(weight, LowRank(lora_a, lora_b, scale), bias)])
    return output


def lora_linears(x: torch.Tensor, layers: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """Return the outputs of layers that share the input x (..., inputs); only x and the adapters get gradients."""
    if not torch.is_grad_enabled():
        return _compute(x, product_rows(x, has_gradient=False), layers)[0]
    updates = [layer.update for layer in layers if layer.update is not None]
    adapters = [update.a for update in updates] + [update.b for update in updates]
    outputs: tuple[torch.Tensor, ...] = _LoraLinears.apply(x, tuple(layers), *adapters)
    return outputs


def _compute(
    x: torch.Tensor, rows: torch.Tensor, layers: Sequence[Projection]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the layers' outputs, shaped and typed as x (..., inputs), and the middles of their updates.

    rows: x as `product_rows` returns it.
    """
    middles = _middles(rows, _updates(layers))
    remaining, outputs = iter(middles), []
    for layer in layers:
        output = frozen_linear(rows, layer.weight, layer.bias)
        if layer.update is not None:
            layer.update.add_to(output, next(remaining))
        outputs.append(output.to(x.dtype).view(*x.shape[:-1], output.shape[-1]))
    return tuple(outputs), middles


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: tuple[Projection, ...], *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs, middles = _compute(x, product_rows(x, has_gradient=any(ctx.needs_input_grad)), layers)
        ctx.layers = layers
        ctx.save_for_backward(x, *adapters, *(middle.to(x.dtype) for middle in middles))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layers, (x, *saved) = ctx.layers, ctx.saved_tensors
        updates = _updates(layers)
        rows = product_rows(x)  # (T, inputs)
        # saved: all A, all B, then all middles (T, rank)
        middles = [middle.to(rows.dtype) for middle in saved[2 * len(updates) :]]
        flat = [grad.reshape(-1, grad.shape[-1]).to(rows.dtype) for grad in grads]  # (T, outputs)
        adapted = [grad for grad, layer in zip(flat, layers, strict=True) if layer.update is not None]
        grad_middles = [update.middle_gradient(grad) for update, grad in zip(updates, adapted, strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(flat, layers)
            for update, grad_middle in zip(updates, grad_middles, strict=True):
                update.add_input_gradient(grad_x, grad_middle)
            grad_x = grad_x.to(x.dtype).view_as(x)
        needed = ctx.needs_input_grad[2:]
        grads_a: list[torch.Tensor | None] = [None] * len(updates)
        if any(needed[: len(updates)]):
            # one product for all layers: (sum of ranks, T) @ (T, inputs)
            ranks = [update.a.shape[0] for update in updates]
            together = (_side_by_side(grad_middles).T @ rows).split(ranks)
            grads_a = [part.to(update.a.dtype) for part, update in zip(together, updates, strict=True)]
        grads_b = [update.b_gradient(*pair) for update, *pair in zip(updates, adapted, middles, strict=True)]
        found = [grad if needs else None for grad, needs in zip([*grads_a, *grads_b], needed, strict=True)]
        return grad_x, None, *found


def frozen_linear(
    rows: torch.Tensor, weight: torch.Tensor | Nf4, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return rows W^T + bias, (T, outputs), in the dtype of `rows` (T, inputs)."""
    if not torch.is_grad_enabled() and bias is None and len(rows) <= MOST_ROWS:
        return matvec(rows, weight)
    with dense_weights([weight], rows.dtype) as (matrix,):
        return F.linear(rows, matrix, None if bias is None else bias.to(rows.dtype))


def product_rows(x: torch.Tensor, *, has_gradient: bool = True) -> torch.Tensor:
    """Return x as (T, inputs), in the dtype of its products."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.to(product_dtype(rows, has_gradient=has_gradient))


def _updates(layers: Sequence[Projection]) -> list[LowRank]:
    return [layer.update for layer in layers if layer.update is not None]


def _middles(rows: torch.Tensor, updates: Sequence[LowRank]) -> tuple[torch.Tensor, ...]:
    """Return x A^T (T, rank) of every update, from one product."""
    if len(updates) < 2:
        return tuple(update.middle(rows) for update in updates)
    together = torch.cat([update.a.to(rows.dtype) for update in updates])
    return F.linear(rows, together).split([update.a.shape[0] for update in updates], dim=1)


def _input_gradient(grads: Sequence[torch.Tensor], layers: Sequence[Projection]) -> torch.Tensor:
    """Return the frozen matrices' share of the gradient of x, (T, inputs)."""
    total: torch.Tensor | None = None
    for grad, layer in zip(grads, layers, strict=True):
        with dense_weights([layer.weight], grad.dtype) as (matrix,):
            total = grad @ matrix if total is None else total.addmm_(grad, matrix)
    assert total is not None
    return total


def _side_by_side(middles: Sequence[torch.Tensor]) -> torch.Tensor:
    return middles[0] if len(middles) == 1 else torch.cat(tuple(middles), dim=1)
