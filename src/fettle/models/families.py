"""The decoder families that fettle supports, as data.

The flags of `Family` describe what distinguishes the families beyond their config.json.
To add a family, add an entry here (docs/adding-a-family.md); the tests pick it up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fettle.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs from the plain Llama decoder. Parameter names are Hugging Face's."""

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Transformers' defaults for options that config.json leaves out, if they differ from USUAL. Only options that a
    plan needs, as it runs without transformers, which takes seconds to import."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Activations that config.json names by another name than transformers: name there -> name in transformers."""
    layer_types: str = "full"
    """Which layers have a sliding window: "full", all, if `sliding_window` is set; "alternating", every other one;
    "late", those from `max_window_layers` on if `use_sliding_window` is set."""
    has_fused_projections: bool = False
    """One `qkv_proj` and one `gate_up_proj` instead of five matrices."""
    has_qkv_bias: bool = False
    """Query, key and value projections have a bias regardless of the config."""
    has_qk_norm: bool = False
    """Queries and keys are normalized per head before the rotation."""
    has_norm_offset: bool = False
    """Norm weights are stored as their difference from one."""
    has_sandwich_norms: bool = False
    """A norm after attention and after the MLP as well as before them."""
    has_scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""
    has_softcap: bool = False
    """Attention scores and logits are bounded by a tanh."""
    has_partial_rotary: bool = False
    """`partial_rotary_factor` is the share of a head's channels that are rotated; other families ignore it."""

    @property
    def config(self) -> "type[PreTrainedConfig]":
        """The family's config class in transformers."""
        import transformers  # takes seconds, so only on demand

        found: type[PreTrainedConfig] = getattr(
            transformers, self.architecture.replace("ForCausalLM", "Config")
        )
        return found


USUAL: dict[str, Any] = {
    "num_key_value_heads": None,  # same as num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
NO_WINDOW = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}
QWEN = NO_WINDOW | {"num_key_value_heads": 32, "max_position_embeddings": 32768}
GEMMA = {
    "head_dim": 256,
    "attention_bias": False,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
        has_fused_projections=True,
        has_partial_rotary=True,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={"head_dim": None, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            "head_dim": None,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", defaults=QWEN, layer_types="late", has_qkv_bias=True),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=QWEN | {"head_dim": 128, "attention_bias": False},
        layer_types="late",
        has_qk_norm=True,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults=GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        activations={"gelu": "gelu_pytorch_tanh"},
        has_norm_offset=True,
        has_scaled_embedding=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=GEMMA
        | {
            "num_key_value_heads": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        layer_types="alternating",
        has_norm_offset=True,
        has_sandwich_norms=True,
        has_scaled_embedding=True,
        has_softcap=True,
    ),
}


def option(config: "PreTrainedConfig", name: str, default: Any = None) -> Any:
    """Return the config's value of an option that its own class declares, else `default`.

    A config.json may hold others, left over from a conversion (a Llama with `sliding_window`); stock models
    ignore them.
    """
    return getattr(config, name) if hasattr(type(config), name) else default


def family_of(model_type: str, where: str) -> Family:
    """Return the family named by config.json's `model_type`; `where` names the checkpoint in the error."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type '{model_type}' is not supported; expected one of {known}.")
    return FAMILIES[model_type]


def head_dim_of(config: "PreTrainedConfig") -> int:
    """Return the channels per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_dim_of(config: "PreTrainedConfig") -> int:
    """Return the channels per attention head that are rotated."""
    share = 1.0
    if FAMILIES[config.model_type].has_partial_rotary:
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return int(head_dim_of(config) * share)


def sliding_window_of(config: "PreTrainedConfig", layer_idx: int) -> int | None:
    """Return how many tokens layer `layer_idx` attends to; None means all."""
    layer_types = option(config, "layer_types")
    if layer_types is not None and layer_types[layer_idx] != "sliding_attention":
        return None
    window: int | None = option(config, "sliding_window")
    return window
