"""Convert a model's linear layers to NF4 and back."""

import torch
from torch import nn

from fettle.ops.nf4 import Nf4
from fettle.quantization.nf4 import Nf4Linear, dense_weight

HEAD = "lm_head"
"""The output head is not quantized, as its rounding affects every token."""


def matrix_of(linear: nn.Linear) -> torch.Tensor | Nf4:
    """Return the matrix of a linear layer as an input of the ops."""
    return linear.nf4 if isinstance(linear, Nf4Linear) else linear.weight


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` is in NF4."""
    return any(isinstance(module, Nf4Linear) for module in model.modules())


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the plain linear layers of `model` except its head, by name: those to quantize."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] != HEAD
    }


def quantize_linears(model: nn.Module) -> None:
    """Convert every linear layer of `model` except its head to NF4, one at a time."""
    for name, module in plain_linears(model).items():
        model.set_submodule(name, Nf4Linear.from_linear(module))


def dequantize_linears(model: nn.Module) -> None:
    """Replace every NF4 layer by the plain layer with its dequantized matrix."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            model.set_submodule(name, _plain(module))


def _plain(layer: Nf4Linear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(dense_weight(layer), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear
