"""Small random models, the same weights in stock transformers and in fettle's decoder.

Every family of `FAMILIES` is here by itself, with what `USUAL` says; `VARIANTS` adds what real checkpoints of
a family differ in. Norm weights and biases are random too: ones and zeros would hide a mistake.
"""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.families import FAMILIES

VOCABULARY = 97
WINDOW = 5

USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# What a family's first case sets beside USUAL.
FIRST: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 24},
    "gemma": {"head_dim": 12},
    "gemma2": {
        "head_dim": 12,
        "num_hidden_layers": 4,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,  # low enough to bend what random weights give
        "final_logit_softcapping": 3.0,
    },
}

# As config.json of Phi-3.5-mini-instruct says it, at a small size.
LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.02, 1.1, 1.3],
        "long_factor": [1.08, 1.6, 9.0, 40.0],
    },
}
LLAMA3 = {
    "max_position_embeddings": 256,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "max_position_embeddings": 128,
}

# Whole config.json files of real checkpoints, at a small size with the same proportions.
LLAMA_32 = {
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 8,  # stated, and not hidden_size / num_attention_heads, as in the 3B
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3["rope_scaling"] | {"factor": 32.0},
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}
PHI3_MEDIUM = {
    "hidden_size": 80,  # no power of two
    "intermediate_size": 112,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "sliding_window": 31,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 64,
}
PHI4_MINI = LONGROPE | {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.02, 1.1],  # three quarters of a head's channels, in pairs
        "long_factor": [1.08, 4.0, 40.0],
    },
    "sliding_window": 128,
    "tie_word_embeddings": True,
}
GEMMA_2B = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("phi3", "longrope", LONGROPE),
    ("phi3", "window", {"sliding_window": WINDOW}),
    ("phi3", "partial-rotary", {"partial_rotary_factor": 0.5}),
    ("phi3", "tied", {"tie_word_embeddings": True}),
    ("phi3", "medium", PHI3_MEDIUM),
    ("phi3", "4-mini", PHI4_MINI),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "llama3-rope", LLAMA3),
    ("llama", "linear-rope", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", "yarn-rope", YARN),
    ("llama", "head-dim", {"head_dim": 16}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("llama", "3.2", LLAMA_32),
    ("mistral", "window", {"sliding_window": WINDOW}),
    ("mistral", "head-dim", {"head_dim": 16, "sliding_window": None}),
    ("qwen2", "window", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("qwen2", "tied", {"tie_word_embeddings": True}),
    ("qwen3", "window", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    ("qwen3", "biases", {"attention_bias": True}),
    ("gemma", "2b", GEMMA_2B),
    ("gemma", "biases", {"attention_bias": True}),
    ("gemma2", "tied", {"tie_word_embeddings": True}),
    ("gemma2", "biases", {"attention_bias": True}),
    ("gemma2", "no-caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
]

# Options of one family in the config.json of another, as conversions leave them; stock models ignore those
# that the family's own config class does not declare.
FOREIGN = {
    "sliding_window": WINDOW,
    "attention_bias": True,
    "mlp_bias": True,
    "resid_pdrop": 0.2,
    "hidden_activation": "relu",
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
    "query_pre_attn_scalar": 3,
}


def foreign_to(family: str) -> dict[str, Any]:
    declared = FAMILIES[family].config.__dataclass_fields__
    return {name: value for name, value in FOREIGN.items() if name not in declared}


@dataclass(frozen=True)
class Case:
    """One family with one set of options; `name` is what the test's id shows."""

    family: str
    name: str
    options: dict[str, Any] = field(hash=False, compare=False)

    def config(self) -> Any:
        options = copy.deepcopy({**USUAL, **FIRST.get(self.family, {}), **self.options})
        return FAMILIES[self.family].config(**options)


PLAIN_CASES = [Case(family, family, {}) for family in FAMILIES]
CASES = [
    *PLAIN_CASES,
    *(Case(family, f"{family}-{name}", options) for family, name, options in VARIANTS),
    *(Case(family, f"{family}-foreign", foreign_to(family)) for family in FAMILIES),
]
DROPOUT_CASES = [
    Case("phi3", "phi3-dropout", {"resid_pdrop": 0.2, "attention_dropout": 0.2}),
    Case("gemma2", "gemma2-dropout", {"attention_dropout": 0.2}),
]
BY_NAME = {case.name: case for case in CASES + DROPOUT_CASES}


@dataclass(frozen=True)
class Pair:
    """The same weights in both, in evaluation mode; `stock` is the oracle. Who changes them takes a copy."""

    case: Case
    stock: PreTrainedModel
    ours: DecoderForCausalLM

    @property
    def both(self) -> tuple[PreTrainedModel, DecoderForCausalLM]:
        return self.stock, self.ours

    def copy(self) -> "Pair":
        return copy.deepcopy(self)


@functools.cache
def make_pair(case: Case) -> Pair:
    torch.manual_seed(0)
    config = case.config()
    # transformers before 5.21 runs Gemma 2 by the fused attention, which leaves the soft cap out
    written_out = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
    stock = AutoModelForCausalLM.from_config(config, **written_out)
    randomise(stock)
    ours = causal_lm_class(case.family)(case.config())
    ours.load_state_dict(stock.state_dict())
    return Pair(case, stock.eval(), ours.eval())


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Matrices that keep an activation's size; norm weights and biases spread about their usual value."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)


def ids_of(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.fixture(params=CASES, ids=ids_of(CASES))
def pair(request: pytest.FixtureRequest) -> Pair:
    """Every family in every variant."""
    return make_pair(request.param)


@pytest.fixture(params=PLAIN_CASES, ids=ids_of(PLAIN_CASES))
def plain_pair(request: pytest.FixtureRequest) -> Pair:
    """Every family once."""
    return make_pair(request.param)


@pytest.fixture(scope="session")
def longrope_pair() -> Pair:
    """Phi-3 with LongRoPE: short factors up to 16 tokens, long ones beyond."""
    return make_pair(BY_NAME["phi3-longrope"])


@pytest.fixture(scope="session")
def pair_of():  # type: ignore[no-untyped-def]
    """A pair by its case's name."""
    return lambda name: make_pair(BY_NAME[name])
