"""The decoder's MLP: through one function wherever its matrices are frozen, through its modules elsewhere."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from fettle.models.families import Family, option
from fettle.ops import gated_activation
from fettle.ops.gated_activation import activation_name_of
from fettle.ops.lora_mlp import MLP, Keep, Projection, lora_mlp
from fettle.quantization.layers import matrix_of
from fettle.quantization.nf4 import Nf4Linear


class DecoderMLP(nn.Module):
    def __init__(self, config: PreTrainedConfig, family: Family) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        bias = bool(option(config, "mlp_bias", False))
        self.is_fused = family.has_fused_projections
        if self.is_fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        else:
            self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
            self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)
        self.activation = ACT2FN[option(config, "hidden_activation") or config.hidden_act]

    def forward(self, x: torch.Tensor, keep: Keep = "gates", skip_output: bool = False) -> torch.Tensor:
        """x: (B, N, E). keep, skip_output: see `lora_mlp`; without effect where the modules must run."""
        mlp = self._as_function() if torch.is_grad_enabled() else None
        if mlp is not None:
            return lora_mlp(x, mlp, keep=keep, skip_output=skip_output)
        gate, up = (
            self.gate_up_proj(x).chunk(2, -1) if self.is_fused else (self.gate_proj(x), self.up_proj(x))
        )
        return self.down_proj(gated_activation(gate, up, self.activation))

    def _as_function(self) -> MLP | None:
        """What `lora_mlp` works on, or None where a matrix is trained or has something it does not cover."""
        modules = [self.gate_up_proj] if self.is_fused else [self.gate_proj, self.up_proj]
        *gate_up, down = (_projection_of(module) for module in (*modules, self.down_proj))
        name = activation_name_of(self.activation)
        found = [projection for projection in gate_up if projection is not None]
        if name is None or down is None or len(found) < len(modules):
            return None
        return MLP(tuple(found), down, name)


def _projection_of(module: Any) -> Projection | None:
    """The frozen matrix of a linear layer, with the update of its adapter; None where there is more to it."""
    if module._forward_hooks or module._forward_pre_hooks:  # somebody wants to see the module run
        return None
    if hasattr(module, "projection"):
        found: Projection | None = module.projection()
        return found
    is_plain = type(module) in (nn.Linear, Nf4Linear) and module.bias is None
    return Projection(matrix_of(module), None) if is_plain and not module.weight.requires_grad else None
