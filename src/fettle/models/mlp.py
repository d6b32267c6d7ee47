"""The decoder's MLP: one fused function if its matrices are frozen, its modules otherwise."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from fettle.models.families import Family, option
from fettle.models.projections import infer, project, projection_of, row_weights
from fettle.ops import gated_activation
from fettle.ops.gated_activation import ACTIVATIONS, Activation, activation_name_of
from fettle.ops.lora_mlp import MLP, Keep, lora_mlp
from fettle.ops.matvec import Norm, matvec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fettle.models.layer import DecoderRMSNorm


class DecoderMLP(nn.Module):
    def __init__(self, config: "PreTrainedConfig", family: Family) -> None:
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
        self.activation = _activation(option(config, "hidden_activation") or config.hidden_act)

    def forward(self, x: torch.Tensor, keep: Keep = "gates", skip_output: bool = False) -> torch.Tensor:
        """x: (B, N, E) -> (B, N, E). keep, skip_output: see `lora_mlp`; ignored if the modules have to run."""
        mlp = self.as_function() if torch.is_grad_enabled() else None
        if mlp is not None:
            return lora_mlp(x, mlp, keep=keep, skip_output=skip_output)
        if self.is_fused:
            gate, up = project(x, self.gate_up_proj)[0].chunk(2, -1)
        else:
            gate, up = project(x, self.gate_proj, self.up_proj)
        return project(gated_activation(gate, up, self.activation), self.down_proj)[0]

    def infer(self, x: torch.Tensor, norm: "DecoderRMSNorm") -> torch.Tensor:
        """Return x + the MLP's output for norm(x), without gradients."""
        name = activation_name_of(self.activation)
        weights = row_weights(x, self.gate_up_proj) if self.is_fused and name is not None else None
        if weights is not None:
            rule = Norm(norm.weight, norm.eps, norm.offset)
            product = matvec(x, weights[0], norm=rule, activation_name=name)
        else:
            if self.is_fused:
                gate, up = infer(x, self.gate_up_proj, norm=norm)[0].chunk(2, -1)
            else:
                gate, up = infer(x, self.gate_proj, self.up_proj, norm=norm)
            product = gated_activation(gate, up, self.activation)
        return infer(product, self.down_proj, residual=x)[0]

    def as_function(self) -> MLP | None:
        """Return the input of `lora_mlp`, or None if a matrix is trained or has a feature that it does not cover."""
        modules = [self.gate_up_proj] if self.is_fused else [self.gate_proj, self.up_proj]
        found = [projection_of(module) for module in (*modules, self.down_proj)]
        covered = [each for each in found if each is not None and each.bias is None]
        name = activation_name_of(self.activation)
        if name is None or len(covered) < len(found):
            return None
        return MLP(tuple(covered[:-1]), covered[-1], name)


def _activation(name: str) -> Activation:
    """Return the activation that transformers calls `name`."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN  # which takes seconds to import

    found: Activation = ACT2FN[name]
    return found
