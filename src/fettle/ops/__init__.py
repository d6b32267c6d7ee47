"""Functions on tensors that know no model. Each documents its formula, what it saves for backward and what it
recomputes there."""

from fettle.ops.attention import Documents, packed_attention, softcap_attention
from fettle.ops.gated_activation import gated_activation
from fettle.ops.lora_linear import lora_linear
from fettle.ops.rms_norm import rms_norm
from fettle.ops.rotary import apply_rotary

__all__ = [
    "Documents",
    "apply_rotary",
    "gated_activation",
    "lora_linear",
    "packed_attention",
    "rms_norm",
    "softcap_attention",
]
