"""Random models of every family, wide enough for K-quants, with fettle-tiny's tokenizer."""

import copy

import pytest
import torch

from fettle.checkpoints.locate import embedded_model
from fettle.engine.llama_cpp.context import BATCH_TOKENS, Context, Part, context_tokens_for
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES
from fettle.models.load import load_tokenizer

USUAL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LONGROPE = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 512,  # llama.cpp rounds a context up to 256 tokens
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + 0.01 * n for n in range(32)],
        "long_factor": [1.1 + 0.5 * n for n in range(32)],
    },
}
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
CASES = {
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", LONGROPE),
    "phi3-partial-rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3-medium": (
        "phi3",
        {"hidden_size": 320, "num_attention_heads": 20, "num_key_value_heads": 5, "sliding_window": 127},
    ),
    "phi4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.01 * n for n in range(24)],
                "long_factor": [1.1 + 0.5 * n for n in range(24)],
            },
        },
    ),
    "llama": ("llama", {}),
    "llama-3.1": ("llama", LLAMA3),
    "llama-3.2": (
        "llama",
        {
            "num_attention_heads": 8,
            "head_dim": 64,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3["rope_scaling"] | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", YARN),
    "qwen3": ("qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8, "tie_word_embeddings": True},
    ),
}


@torch.no_grad()
def random_model(case: str):
    """Weights that keep an activation's size; norms and biases spread about their usual value."""
    family, options = CASES[case]
    torch.manual_seed(0)
    config = FAMILIES[family].config(**copy.deepcopy({**USUAL, "vocab_size": 1280, **options}))
    model = causal_lm_class(family)(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(params=CASES)
def model(request):
    """Every case."""
    return random_model(request.param)


@pytest.fixture(scope="session")
def model_of():
    """A random model by its case's name."""
    return random_model


@pytest.fixture(scope="session")
def kl():
    """`divergence`, for tests."""
    return divergence


@pytest.fixture(scope="session")
def logits_of():
    """`context_logits`, for tests."""
    return context_logits


def context_of(path, ids: list[int]) -> Context:
    """A context of llama.cpp for a text of the length of `ids`."""
    file = GGUFFile(path)
    return Context(file, context_tokens_for(file, len(ids)), 1)


def context_logits(context: Context, ids: list[int]) -> torch.Tensor:
    """The logits at every position, fp32 (tokens, vocabulary)."""
    chunks = [ids[begin : begin + BATCH_TOKENS] for begin in range(0, len(ids), BATCH_TOKENS)]
    return torch.cat([context.run([Part(0, chunk, range(len(chunk)))]).clone() for chunk in chunks])


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(embedded_model())


@torch.no_grad()
def divergence(model, path, ids: list[int]) -> float:
    """Mean KL(source || file) in nats."""
    source = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    found = context_logits(context_of(path, ids), ids).double().log_softmax(-1)
    return float((source.exp() * (source - found)).sum(-1).mean())
