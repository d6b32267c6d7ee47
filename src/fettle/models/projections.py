"""Convert linear layers to the inputs of the ops: frozen matrix, low-rank update, bias."""

from typing import Any

import torch
from torch import nn

from fettle.ops.lora_linear import Projection, lora_linears
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
    if torch.is_grad_enabled():
        known = [found for layer in layers if (found := projection_of(layer)) is not None]
        if len(known) == len(layers) and any(projection.update for projection in known):
            return lora_linears(x, known)
    return tuple(layer(x) for layer in layers)
