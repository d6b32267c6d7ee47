"""A model's metadata in GGUF, per family: tensor names, sizes and other values, and tensors with another layout.

A GGUF file names the architecture, has its values under `{architecture}.…`, and stores tensors under llama.cpp's own
names. Three groups of tensors differ from Hugging Face's layout:

- q and k of Llama and Mistral: llama.cpp rotates neighbouring channels (2i, 2i + 1), Hugging Face channel i with
  i + head_dim / 2, so the rows of each head are interleaved;
- Gemma's norms are stored with the one added that Hugging Face's code adds at run time;
- rotary scalings that differ from channel to channel (Llama 3.1, LongRoPE) are tensors of factors.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from fettle.errors import UserError
from fettle.models.families import head_dim_of, option, sliding_window_of


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """How one family is stored in GGUF. Tensor names are those of `LAYER` unless `names` overrides them."""

    architecture: str
    names: dict[str, str] = field(default_factory=dict)
    has_interleaved_heads: bool = False
    """q and k are interleaved for llama.cpp's rotation."""
    has_norm_offset: bool = False
    writes_window: bool = False
    """The file states the sliding window, which llama.cpp requires."""
    uses_window: bool = False
    """llama.cpp applies the sliding window."""
    figures: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    """The family's own entries, under `{architecture}.`."""
    activations: tuple[str, ...] = ("silu", "swish")
    """The activation that llama.cpp hard-codes for this architecture, by its names in transformers."""
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
    has_attention_bias: bool = False
    """llama.cpp supports biases of the attention projections."""
    has_own_head: bool = True
    """llama.cpp supports an output head that is not tied to the embedding."""


OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SANDWICH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _llama_figures(config: PreTrainedConfig) -> dict[str, Any]:
    return {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim_of(config)}


def _phi3_figures(config: PreTrainedConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    original = (
        rope.get("original_max_position_embeddings")
        or option(config, "original_max_position_embeddings")
        or config.max_position_embeddings
    )
    figures = {
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * head_dim_of(config)),
        "rope.scaling.original_context_length": original,
    }
    if rope["rope_type"] == "longrope":
        figures["rope.scaling.attn_factor"] = attention_factor(config, original)
    return figures


def attention_factor(config: PreTrainedConfig, original_tokens: int) -> float:
    """LongRoPE's factor on cos and sin: sqrt(1 + ln(scale) / ln(original context)), arXiv 2402.13753."""
    given = config.rope_parameters.get("attention_factor")
    scale = config.max_position_embeddings / original_tokens
    if given is not None:
        return float(given)
    return math.sqrt(1 + math.log(scale) / math.log(original_tokens)) if scale > 1 else 1.0


def _gemma2_figures(config: PreTrainedConfig) -> dict[str, Any]:
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if None in caps:
        raise UserError("llama.cpp runs Gemma 2 only with both soft caps; this config.json lacks one.")
    is_27b = config.num_hidden_layers == 46  # how llama.cpp detects it
    expected = config.hidden_size / config.num_attention_heads if is_27b else head_dim_of(config)
    if config.query_pre_attn_scalar != expected:
        raise UserError(
            f"llama.cpp divides this Gemma 2's queries by sqrt({expected:g}); this config.json asks for "
            f"query_pre_attn_scalar = {config.query_pre_attn_scalar}, which a GGUF file cannot express."
        )
    if any(
        (kind == "sliding_attention") != (layer % 2 == 0) for layer, kind in enumerate(config.layer_types)
    ):
        raise UserError(
            "llama.cpp gives Gemma 2 a sliding window in every other layer, starting with the first; this "
            "config.json has different layer_types, which a GGUF file cannot express."
        )
    return {"attn_logit_softcapping": caps[0], "final_logit_softcapping": caps[1]}


GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

GGUF_FAMILIES: dict[str, GGUFFamily] = {
    "phi3": GGUFFamily(
        architecture="phi3", writes_window=True, figures=_phi3_figures, rope_types=("default", "longrope")
    ),
    "llama": GGUFFamily(
        architecture="llama", has_interleaved_heads=True, figures=_llama_figures, has_attention_bias=True
    ),
    "mistral": GGUFFamily(architecture="llama", has_interleaved_heads=True, figures=_llama_figures),
    "qwen2": GGUFFamily(architecture="qwen2"),
    "qwen3": GGUFFamily(architecture="qwen3"),
    "gemma": GGUFFamily(
        architecture="gemma", has_norm_offset=True, activations=GELU_TANH, has_own_head=False
    ),
    "gemma2": GGUFFamily(
        architecture="gemma2",
        names=SANDWICH_NORMS,
        has_norm_offset=True,
        writes_window=True,
        uses_window=True,
        figures=_gemma2_figures,
        activations=GELU_TANH,
        has_own_head=False,
    ),
}


def gguf_family_of(config: PreTrainedConfig) -> GGUFFamily:
    """Return how the config's family is stored in GGUF; UserError if it is not supported."""
    if config.model_type not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        raise UserError(
            f"model_type '{config.model_type}' cannot be exported as GGUF; expected one of {known}."
        )
    return GGUF_FAMILIES[config.model_type]


def figures_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries under `{architecture}.`: sizes, rotary options, and the family's own."""
    family, head_dim = gguf_family_of(config), head_dim_of(config)
    _require_expressible(config, family)
    figures = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if getattr(config, "head_dim", None) is not None:
        figures |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if family.writes_window:
        figures["attention.sliding_window"] = option(config, "sliding_window") or 0
    return figures | _scaling(config) | family.figures(config)


def _require_expressible(config: PreTrainedConfig, family: GGUFFamily) -> None:
    """Raise UserError for options that llama.cpp would compute differently from the config."""
    activation = option(config, "hidden_activation") or config.hidden_act
    if activation not in family.activations:
        raise UserError(
            f"llama.cpp computes {family.activations[0]} in a {config.model_type} model's MLP; this config.json asks "
            f"for {activation}, which a GGUF file cannot express."
        )
    if (kind := config.rope_parameters["rope_type"]) not in family.rope_types:
        raise UserError(
            f"llama.cpp does not support rope type '{kind}' in a {config.model_type} model; it supports "
            f"{', '.join(family.rope_types)}."
        )
    if option(config, "attention_bias") and not family.has_attention_bias:
        raise UserError(
            f"llama.cpp does not support the attention biases (attention_bias) of this {config.model_type} model."
        )


def ignored_window(config: PreTrainedConfig) -> int | None:
    """Return the sliding window, in tokens, that llama.cpp ignores; None if that makes no difference."""
    if gguf_family_of(config).uses_window:
        return None
    windows = (sliding_window_of(config, layer) for layer in range(config.num_hidden_layers))
    window = min((each for each in windows if each is not None), default=config.max_position_embeddings)
    return window if window < config.max_position_embeddings else None


YARN_USUAL = {
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
}
"""Defaults of both llama.cpp and transformers."""


def _scaling(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rope scalings that are stored as values; llama3 and longrope are tensors (see `factor_tensors`)."""
    rope = config.rope_parameters
    if rope["rope_type"] == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        for name, usual in YARN_USUAL.items():
            if rope.get(name, usual) not in (usual, None):
                raise UserError(
                    f"this config.json's yarn scaling has {name} = {rope[name]}, which GGUF export does not support; "
                    f"expected {usual}."
                )
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        }
    return {}


def factor_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Return the rotary factors, (rotary_dim / 2,) in fp32, that divide the frequencies channel by channel."""
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float)
            for length in ("long", "short")
        }
    return {"rope_freqs.weight": _llama3_factors(config)} if rope["rope_type"] == "llama3" else {}


def _llama3_factors(config: PreTrainedConfig) -> torch.Tensor:
    """Return 1 for short wavelengths, `factor` for long ones, and a smooth transition between (Llama 3.1)."""
    rope, head_dim = config.rope_parameters, head_dim_of(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    # In llama.cpp's order of operations, for the same rounding.
    wave_tokens = 2 * math.pi / (1 / rope["rope_theta"] ** exponents)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wave_tokens
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def gguf_name(name: str, config: PreTrainedConfig) -> str:
    """Return llama.cpp's name of the tensor that Hugging Face calls `name`; UserError if it has none."""
    names = LAYER | gguf_family_of(config).names
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer and layer[2] in names:
        return f"blk.{layer[1]}.{names[layer[2]]}.{kind}"
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    raise UserError(
        f"The tensor '{name}' is not part of a {config.model_type} model; GGUF has no name for it."
    )


def as_stored(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Return `tensor`, called `name` in Hugging Face, in the layout that llama.cpp expects."""
    family = gguf_family_of(config)
    if family.has_norm_offset and name.endswith("norm.weight"):
        return tensor.float() + 1
    if family.has_interleaved_heads:
        if ".q_proj." in name:
            return interleave(tensor, config.num_attention_heads)
        if ".k_proj." in name:
            return interleave(tensor, config.num_key_value_heads)
    return tensor


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from (half, i) to (i, half); tensor: (heads * head_dim, ...)."""
    split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)
