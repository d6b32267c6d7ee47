"""The gated MLP of a decoder layer with low-rank updates, as one function.

    y = down(a(gate(x)) * up(x)),  each of the three a frozen matrix plus scale * (. A^T) B^T

Autograd's own graph keeps x, gate, up, a(gate), their product and every low-rank middle. Saved here: x and, with
keep="gates", gate and up; with keep="input" they are recomputed too. Always recomputed: the product and the middles.
The frozen matrices get no gradient; NF4 ones are dequantized once in forward and once in backward.

Tokens are processed in tiles, so that recomputed tensors never exist for all tokens at once. The tiles do not depend
on what is kept, so the results are bit-identical. If products run in another dtype than x's
(`dispatch.product_dtype`), a tile is converted once, and only its results are rounded back.

Shapes: T tokens, t tokens in a tile, E hidden size, I intermediate size, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import product_dtype
from fettle.ops.gated_activation import gated_activation_backward, gated_activation_forward
from fettle.ops.lora_linear import LowRank, Projection
from fettle.ops.nf4 import dense
from fettle.ops.scratch import dense_weights

Keep = Literal["gates", "input"]

TILE_TOKENS = {"cpu": 512, "cuda": 8192}
"""From about this many tokens on, a matrix product runs at the device's full speed."""


@dataclass(frozen=True, slots=True)
class MLP:
    """gate_up: one fused projection with 2I outputs, the gate's first, or the two projections gate and up."""

    gate_up: tuple[Projection, ...]
    down: Projection
    activation_name: str

    @property
    def intermediate_size(self) -> int:
        """Return I."""
        outputs = self.gate_up[0].weight.shape[0]
        return outputs if len(self.gate_up) == 2 else outputs // 2

    def adapters(self) -> list[torch.Tensor | None]:
        """Return A and B of every projection; None, None for one without an update."""
        updates = [projection.update for projection in (*self.gate_up, self.down)]
        return [t for u in updates for t in ((u.a, u.b) if u else (None, None))]


def lora_mlp_reference(x: torch.Tensor, mlp: MLP) -> torch.Tensor:
    """Compute the formula above in plain PyTorch: the specification of `lora_mlp`."""

    def project(x: torch.Tensor, projection: Projection) -> torch.Tensor:
        output = F.linear(x, dense(projection.weight, x.dtype))
        if (update := projection.update) is None:
            return output
        return output + update.scale * F.linear(F.linear(x, update.a.to(x.dtype)), update.b.to(x.dtype))

    gate, up = torch.cat([project(x, p) for p in mlp.gate_up], -1).chunk(2, -1)
    activated = F.silu(gate) if mlp.activation_name == "silu" else F.gelu(gate, approximate="tanh")
    return project(activated * up, mlp.down)


def lora_mlp(x: torch.Tensor, mlp: MLP, *, keep: Keep = "gates", skip_output: bool = False) -> torch.Tensor:
    """Return the MLP's output (..., E); only x and the adapters get gradients. x: (..., E).

    skip_output: leave the output uninitialized. For a layer that is recomputed in backward, which needs only what
    this function saves.
    """
    output: torch.Tensor = _LoraMLP.apply(x, mlp, keep, skip_output, *mlp.adapters())
    return output


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mlp: MLP, keep: Keep, skip_output: bool, *adapters: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.mlp = mlp
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, kept = x.reshape(-1, x.shape[-1]), []
        if keep == "gates":
            kept = [x.new_empty(len(rows), mlp.intermediate_size) for _ in range(2)]
        ctx.save_for_backward(x, *adapters, *kept)  # the adapters, so that autograd detects in-place changes
        if keep == "input" and skip_output:
            return output  # nothing to compute
        dtype = product_dtype(rows)
        with _dense_linears(mlp, dtype, has_down=not skip_output) as (*gate_up, down):
            for tile in _tiles(rows):
                x_tile = rows[tile].to(dtype)
                gate, up = (linear.forward(x_tile) for linear in gate_up)  # (t, I)
                for whole, part in zip(kept, (gate, up), strict=False):  # kept may be empty
                    whole[tile] = part
                if not skip_output:
                    product = gated_activation_forward(gate, up, mlp.activation_name)
                    output.view(rows.shape)[tile] = down.forward(product)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mlp: MLP = ctx.mlp
        x, *saved = ctx.saved_tensors
        kept = saved[len(mlp.adapters()) :]
        rows, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
        dtype = product_dtype(rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(rows, memory_format=torch.contiguous_format)
        with _dense_linears(mlp, dtype) as (gate, up, down):
            for tile in _tiles(rows):
                kept_tile = [whole[tile] for whole in kept]
                grad_tile = _backward_tile(
                    *(grad[tile], rows[tile], kept_tile, (gate, up, down), mlp.activation_name),
                    needs_input_grad=grad_x is not None,
                )
                if grad_x is not None and grad_tile is not None:
                    grad_x[tile] = grad_tile
        adapters = _adapter_gradients(mlp, (gate, up), down)
        return (None if grad_x is None else grad_x.view_as(x)), None, None, None, *adapters


def _backward_tile(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    kept: list[torch.Tensor],
    linears: "tuple[_Linear, _Linear, _Linear]",
    activation_name: str,
    *,
    needs_input_grad: bool,
) -> torch.Tensor | None:
    """Add the tile's share to the updates' gradients and return the gradient of x, (t, E).

    grad_output, x: (t, E). kept: the tile's gate and up, (t, I) each, or empty to recompute them.
    """
    *gate_up, down = linears
    dtype = down.weight.dtype
    grad_output, x = grad_output.to(dtype), x.to(dtype)
    gate, up = (whole.to(dtype) for whole in kept) if kept else (linear.forward(x) for linear in gate_up)
    # Through down. Its adapter's gradients need its input, the product, which the activation's backward recomputes.
    grad_middle = down.middle_gradient(grad_output)  # (t, r)
    grad_product = down.input_gradient(grad_output, grad_middle)  # (t, I)
    *grad_gate_up, product = gated_activation_backward(grad_product, gate, up, activation_name)  # (t, I) each
    down.add_gradients(grad_output, grad_middle, product)
    del grad_product, product, gate, up, grad_output  # peak memory is in the loop below
    # Through gate and up, whose gradients of x add up.
    grad_x: torch.Tensor | None = None
    for linear, grad_part in zip(gate_up, grad_gate_up, strict=True):
        grad_middle = linear.middle_gradient(grad_part)  # (t, r)
        linear.add_gradients(grad_part, grad_middle, x)
        if needs_input_grad:
            grad_x = linear.input_gradient(grad_part, grad_middle, grad_x)  # (t, E)
    return grad_x


class _Linear:
    """One dense matrix with its update, and the sums over tiles of the update's gradients (of A, of B)."""

    def __init__(self, update: LowRank | None, weight: torch.Tensor) -> None:
        self.update, self.weight = update, weight
        self.gradients: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = F.linear(x, self.weight)
        return self.update.add_to(output, self.update.middle(x)) if self.update else output

    def middle_gradient(self, grad: torch.Tensor) -> torch.Tensor | None:
        return self.update.middle_gradient(grad) if self.update else None

    def input_gradient(
        self, grad: torch.Tensor, middle: torch.Tensor | None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the gradient of the input, added to `onto` in place if given. grad: (t, outputs)."""
        grad_x = grad @ self.weight if onto is None else onto.addmm_(grad, self.weight)
        if self.update is not None and middle is not None:
            self.update.add_input_gradient(grad_x, middle)
        return grad_x

    def add_gradients(self, grad: torch.Tensor, middle: torch.Tensor | None, x: torch.Tensor) -> None:
        if self.update is None or middle is None:
            return
        # `middle` is the gradient of x A^T; x A^T itself was not saved and is recomputed for B's gradient.
        grad_b = self.update.b_gradient(grad, self.update.middle(x))  # (outputs, r)
        of_tile = (middle.T @ x).to(self.update.a.dtype), grad_b  # A's: (r, inputs)
        if self.gradients is None:
            self.gradients = of_tile
        else:
            for total, part in zip(self.gradients, of_tile, strict=True):
                total.add_(part)


@contextmanager
def _dense_linears(
    mlp: MLP, dtype: torch.dtype, *, has_down: bool = True
) -> Iterator[tuple[_Linear, _Linear, _Linear]]:
    """Yield gate, up and down with dense matrices and their updates, valid within the block only.

    A fused gate_up is split into halves that share A. Without `has_down` the third is meaningless.
    """
    layers = [*mlp.gate_up, mlp.down] if has_down else list(mlp.gate_up)
    with dense_weights([layer.weight for layer in layers], dtype) as weights:
        linears = [_Linear(layer.update, weight) for layer, weight in zip(layers, weights, strict=True)]
        if len(mlp.gate_up) == 1:
            linears[:1] = _halved(linears[0])
        gate, up = linears[:2]
        yield gate, up, linears[-1]


def _halved(fused: _Linear) -> list[_Linear]:
    halves, update = fused.weight.chunk(2), fused.update
    if update is None:
        return [_Linear(None, half) for half in halves]
    return [
        _Linear(LowRank(update.a, b, update.scale), half)
        for half, b in zip(halves, update.b.chunk(2), strict=True)
    ]


def _adapter_gradients(
    mlp: MLP, gate_up: tuple[_Linear, _Linear], down: _Linear
) -> list[torch.Tensor | None]:
    """Return the gradients of A and B in the order of `MLP.adapters`."""
    found = [linear.gradients or (None, None) for linear in (*gate_up, down)]
    if len(mlp.gate_up) == 1 and mlp.gate_up[0].update is not None:
        (gate_a, gate_b), (up_a, up_b), of_down = found
        assert gate_a is not None and gate_b is not None and up_a is not None and up_b is not None
        return [gate_a + up_a, torch.cat((gate_b, up_b)), *of_down]  # both halves share A; B is their rows
    if len(mlp.gate_up) == 1:
        return [None, None, *found[2]]
    return [gradient for pair in found for gradient in pair]


def _tiles(rows: torch.Tensor) -> list[slice]:
    size = TILE_TOKENS.get(rows.device.type, TILE_TOKENS["cuda"])
    return [slice(start, start + size) for start in range(0, len(rows), size)]
