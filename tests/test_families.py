"""From config.json to GGUF: small models whose config.json is that of a published one, through every command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fettle.adapters.model_ref import resolve
from fettle.checkpoints.folder import inspect
from fettle.checkpoints.locate import embedded_model
from fettle.engine.load import load
from fettle.export.checkpoint import export_safetensors
from fettle.export.gguf import export_gguf, verify
from fettle.export.merge import load_merged
from fettle.models.config import config_of
from fettle.models.load import load_model, load_tokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated",
    "ignore:Model (has|with) .tie_word_embeddings",
    "ignore:Input and output embeddings",
)

# Sizes in the proportions of the original; everything else as its config.json has it, but for special tokens.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-3B-Instruct": {
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 96,
        "intermediate_size": 256,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "Phi-3-medium-4k-instruct": {
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 160,
        "intermediate_size": 544,
        "max_position_embeddings": 4096,
        "num_attention_heads": 20,
        "num_hidden_layers": 2,
        "num_key_value_heads": 5,
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "gemma-2b-it": {
        "model_type": "gemma",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 32,
        "hidden_act": "gelu",
        "hidden_size": 128,
        "intermediate_size": 512,
        "max_position_embeddings": 8192,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    },
}
TIED = ["Llama-3.2-3B-Instruct", "gemma-2b-it"]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint folder as stock transformers writes it, under its original config.json."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(MODELS[name], tmp_path_factory.mktemp("models") / name)
        return made[name]

    return make


@torch.no_grad()
def make_checkpoint(content: dict[str, Any], folder: Path) -> Path:
    tokenizer = load_tokenizer(embedded_model())
    ids = {f"{role}_token_id": tokenizer.eos_token_id for role in ("bos", "eos", "pad")}
    content = content | ids | {"vocab_size": len(tokenizer)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(folder).config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Path:
    """Every model."""
    return folder_of(request.param)


@pytest.fixture(scope="session")
def run_of(
    folder_of: Callable[[str], Path], cli: Any, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """What `fettle train` leaves of a few steps, with the weights as stored or in NF4."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, weights: str = "bfloat16") -> Path:
        if (name, weights) not in made:
            output = tmp_path_factory.mktemp("runs") / f"{name}-{weights}"
            more = ("--quantization", "nf4") if weights == "nf4" else ()
            ended = cli(
                *("train", "--model", folder_of(name), "--data", chats, "--output", output, *more),
                *("--max-steps", 6, "--learning-rate", 0.01, "--samples", 0, "--rank", 4, "--device", "cpu"),
            )
            assert ended.code == 0, ended.err
            made[name, weights] = output
        return made[name, weights]

    return make


def is_tied(folder: Path) -> bool:
    return bool(config_of(folder).config.tie_word_embeddings)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 45)[None]
    logits: torch.Tensor = model.eval().float()(ids, use_cache=False).logits
    return logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def stock(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "gemma":
        config.hidden_act = "gelu_pytorch_tanh"  # transformers 5.17 takes the old name, gelu, literally
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


def test_a_checkpoint_says_what_it_says_in_transformers(folder: Path) -> None:
    model = load_model(folder, dtype="float32")
    torch.testing.assert_close(logits_of(model), logits_of(stock(folder)), rtol=0, atol=2e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied(folder)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_plan_counts_the_weights_that_are_loaded(folder: Path, quantization: Any, cli: Any) -> None:
    model = load_model(
        folder, quantization=quantization
    )  # in NF4, a table that is not tied stays in its file
    found = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    # 1 KB a layer of NF4 is its map of 256 values, which all layers share
    maps = sum(t.numel() * 4 for name, t in model.named_buffers() if name.endswith("nested_quant_map"))
    more = () if quantization is None else ("--quantization", quantization)
    ended = cli("plan", "--model", folder, "--device", "cpu", "--json", *more)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["memory_bytes"]["weights"] == pytest.approx(found - maps, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_says_in_peft_what_it_says_here(name: str, folder_of: Any, run_of: Any) -> None:
    base, run = folder_of(name), run_of(name)
    assert all(".lora_" in key for key in load_file(run / "adapter_model.safetensors"))
    theirs = logits_of(PeftModel.from_pretrained(stock(base), run))
    ours = logits_of(load(run, dtype="float32", device="cpu")[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert difference(logits_of(stock(base)), theirs) > 1e-3, "nothing was learned"


@pytest.mark.parametrize(
    ("name", "weights"), [*((name, "bfloat16") for name in MODELS), ("Llama-3.2-3B-Instruct", "nf4")]
)
def test_a_merged_folder_opens_in_transformers(
    name: str, weights: str, folder_of: Any, run_of: Any, cli: Any, tmp_path: Path
) -> None:
    run = run_of(name, weights)
    ended = cli("export", "--model", run, "--to", tmp_path / "out")
    assert ended.code == 0, ended.err
    expected = logits_of(load_merged(resolve(run), device="cpu")[0])
    torch.testing.assert_close(logits_of(stock(tmp_path / "out")), expected, rtol=0, atol=2e-5)
    assert ("lm_head.weight" in inspect(tmp_path / "out").tensors) is not is_tied(folder_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_an_nf4_folder_is_the_model_quantized(name: str, folder_of: Any, cli: Any, tmp_path: Path) -> None:
    base = folder_of(name)
    ended = cli("export", "--model", base, "--format", "nf4", "--to", tmp_path / "out")
    assert ended.code == 0, ended.err
    found, expected = load_model(tmp_path / "out"), load_model(base, quantization="nf4")
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is is_tied(base)
    assert torch.equal(logits_of(found), logits_of(expected))


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_says_it_in_llama_cpp(name: str, folder_of: Any, run_of: Any, tmp_path: Path) -> None:
    run = run_of(name)
    export_gguf(run, tmp_path / "m.gguf", quantizations=["f32"])
    model, tokenizer = load_merged(resolve(run), dtype="float32", device="cpu")
    assert verify(tmp_path / "m.gguf", model, tokenizer, texts=["Say 7."]).kl < 1e-5
    tensors = {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert ("output.weight" in tensors) is not is_tied(folder_of(name))


WHOLE = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", TIED)
def test_a_tied_table_trained_beside_the_adapter(
    name: str, kind: str, folder_of: Any, tmp_path: Path
) -> None:
    """PEFT's `modules_to_save`: the copies are no longer tied unless the adapter says so."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"], **WHOLE[kind])
    adapted = get_peft_model(stock(folder_of(name)), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.peft_config["default"].base_model_name_or_path = str(folder_of(name))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(PeftModel.from_pretrained(stock(folder_of(name)), tmp_path / "adapter"))
    ours, tokenizer = load(tmp_path / "adapter", dtype="float32", device="cpu")
    torch.testing.assert_close(logits_of(ours), expected, rtol=0, atol=2e-5)
    merged = stock(export_safetensors(tmp_path / "adapter", tmp_path / "merged", dtype="float32"))
    assert difference(logits_of(merged), expected) < 2e-2  # PEFT merges in bf16; the copies differ by half
    if name == "gemma-2b-it" and kind != "as one":
        return  # llama.cpp has no Gemma with a head of its own
    export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", quantizations=["f32"])
    assert verify(tmp_path / "m.gguf", merged, tokenizer, texts=["Say 7."]).kl < 1e-5
