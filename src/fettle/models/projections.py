"""Convert linear layers to the inputs of the ops: frozen matrix, low-rank update, bias."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fettle.ops.dispatch import product_dtype, uses_triton
from fettle.ops.lora_linear import Projection, frozen_linear, lora_linears
from fettle.ops.matvec import Norm, matvec
from fettle.ops.nf4 import Nf4
from fettle.quantization.layers import matrix_of
from fettle.quantization.nf4 import Nf4Linear

if TYPE_CHECKING:
    from fettle.models.layer import DecoderRMSNorm


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
        return infer(x, *layers)
    known = [found for layer in layers if (found := projection_of(layer)) is not None]
    if len(known) == len(layers) and any(projection.update for projection in known):
        return lora_linears(x, known)
    return tuple(layer(x) for layer in layers)


def infer(
    x: torch.Tensor,
    *layers: nn.Module,
    norm: "DecoderRMSNorm | None" = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return layer(norm(x)) + residual for each layer, without gradients.

    On a GPU a single token, whose time is that of reading the matrices, gets all of it in one launch per layer.
    """
    if (weights := row_weights(x, *layers)) is not None:
        rule = None if norm is None else Norm(norm.weight, norm.eps, norm.offset)
        return tuple(matvec(x, weight, norm=rule, residual=residual) for weight in weights)
    x = x if norm is None else norm(x)
    outputs = tuple(_apply(layer, x) for layer in layers)
    return outputs if residual is None else tuple(output + residual for output in outputs)


def row_weights(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor | Nf4] | None:
    """Return the layers' matrices if `matvec` can do their work on x: a single row on a GPU, no adapter, no bias."""
    if not x.is_cuda or x.numel() != x.shape[-1] or not uses_triton(x):
        return None
    known = [projection_of(layer) for layer in layers]
    weights = [
        each.weight for each in known if each is not None and each.update is None and each.bias is None
    ]
    return weights if len(weights) == len(layers) else None


def _apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return layer(x); a plain product runs in fp32 if the CPU would emulate it in x's dtype."""
    if type(layer) is nn.Linear and not layer._forward_hooks and not layer.weight.is_meta:
        rows = x.reshape(-1, x.shape[-1])
        dtype = product_dtype(rows, has_gradient=False)
        if layer.weight.dtype == x.dtype and dtype != x.dtype:
            output = frozen_linear(rows.to(dtype), layer.weight, layer.bias)
            return output.to(x.dtype).view(*x.shape[:-1], -1)
    return layer(x)
