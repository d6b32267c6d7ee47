"""The families of decoder fettle knows, as data.

What distinguishes one family from another beyond its config.json is named by the flags of `Family`.
To add a family: one row here, and its parity test (tests/models/test_parity.py) finds it by itself.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fettle.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family departs from the plain Llama decoder. Parameter names are Hugging Face's."""

    config: type[PreTrainedConfig]
    architecture: str
    has_fused_projections: bool = False
    """One `qkv_proj` and one `gate_up_proj` where others have five matrices."""
    has_qkv_bias: bool = False
    """Query, key and value carry a bias whatever the config says."""
    has_qk_norm: bool = False
    """Queries and keys are normalised per head before the rotation."""
    has_norm_offset: bool = False
    """Norm weights are stored as their distance from one."""
    has_sandwich_norms: bool = False
    """A norm after attention and after the MLP as well as before them."""
    has_scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    has_softcap: bool = False
    """Attention scores and logits are bounded by a tanh."""


FAMILIES: dict[str, Family] = {
    "phi3": Family(config=Phi3Config, architecture="Phi3ForCausalLM", has_fused_projections=True),
    "llama": Family(config=LlamaConfig, architecture="LlamaForCausalLM"),
    "mistral": Family(config=MistralConfig, architecture="MistralForCausalLM"),
    "qwen2": Family(config=Qwen2Config, architecture="Qwen2ForCausalLM", has_qkv_bias=True),
    "qwen3": Family(config=Qwen3Config, architecture="Qwen3ForCausalLM", has_qk_norm=True),
    "gemma2": Family(
        config=Gemma2Config,
        architecture="Gemma2ForCausalLM",
        has_norm_offset=True,
        has_sandwich_norms=True,
        has_scaled_embedding=True,
        has_softcap=True,
    ),
}


def option(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """Return the config's value of an option that its own class declares, else `default`.

    A config.json may hold others, left over from a conversion (a Llama with `sliding_window`); stock models
    ignore them.
    """
    return getattr(config, name) if hasattr(type(config), name) else default


def family_of(model_type: str, where: str) -> Family:
    """Return the family named by config.json's `model_type`; `where` names the checkpoint in the error."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type '{model_type}' is not a family fettle knows; it knows {known}.")
    return FAMILIES[model_type]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Channels of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sliding_window_of(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """How many tokens back layer `layer_idx` sees; None: all of them."""
    layer_types = option(config, "layer_types")
    if layer_types is not None and layer_types[layer_idx] != "sliding_attention":
        return None
    window: int | None = option(config, "sliding_window")
    return window
