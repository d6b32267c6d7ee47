"""Convert linear layers to the inputs of the ops: frozen matrix, low-rank update, bias."""

from typing import Any

import torch
from torch import nn

from fettle.ops.dispatch import product_dtype
from fettle.ops.lora_linear import Projection, frozen_linear, lora_linears
from fettle.quantization.layers import matrix_of
from fettle.quantization.nf4 import Nf4Linear


def projection_of(layer: Any) -> Projection | None:
    """Return the layer's frozen matrix with its update; None if the matrix is trained or the layer does more."""
    if layer._forward_hooks or layer._forward_pre_hooks:  # hooks require the module to run
        return None
    if hasattr(layer, "projection"):
        found: Projection | None = layer.projection()
        return found
    is_plain = type(layer) in (nn.Linear, Nf4Linear) and not layer.weight.requires_grad
    is_plain = is_plain and (layer.bias is None or not layer.bias.requires_grad)
    return Projection(matrix_of(layer), None, layer.bias) if is_plain else None


def project(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """Return the layers' outputs for the shared input x (..., inputs), fused in training if all of them allow it."""
    if not torch.is_grad_enabled():
        return tuple(_infer(layer, x) for layer in layers)
    known = [found for layer in layers if (found := projection_of(layer)) is not None]
    if len(known) == len(layers) and any(projection.update for projection in known):
        return lora_linears(x, known)
    return tuple(layer(x) for layer in layers)


def _infer(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return layer(x); a plain product uses the kernel for one row, and fp32 if the CPU would emulate x's dtype."""
    if type(layer) is nn.Linear and not layer._forward_hooks and not layer.weight.is_meta:
        rows = x.reshape(-1, x.shape[-1])
        dtype = product_dtype(rows, has_gradient=False)
        if layer.weight.dtype == x.dtype and (dtype != x.dtype or (x.is_cuda and len(rows) == 1)):
            output = frozen_linear(rows.to(dtype), layer.weight, layer.bias)
            return output.to(x.dtype).view(*x.shape[:-1], -1)
    return layer(x)
