"""Models in NF4: quantised while they load, written, opened by bitsandbytes, trained on, exported."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fettle.engine.load import load
from fettle.errors import UserError
from fettle.export.checkpoint import export_safetensors
from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES
from fettle.models.load import load_model, load_tokenizer
from fettle.models.quantized import save_nf4
from fettle.models.save import save_model
from fettle.quantization.layers import dequantize_linears, is_quantized, quantize_linears

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=["phi3", "llama"])
def folder(
    request: pytest.FixtureRequest, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small checkpoint in bf16."""
    to = tmp_path_factory.mktemp("bf16") / request.param
    tokenizer = load_tokenizer(small_model)
    torch.manual_seed(0)
    config = FAMILIES[request.param].config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = causal_lm_class(request.param)(config).to(torch.bfloat16)
    save_model(model, tokenizer, to)
    return to


@pytest.fixture(scope="module")
def nf4_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("nf4") / folder.name
    save_nf4(load_model(folder, quantization="nf4"), load_tokenizer(folder), to)
    return to


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def test_loading_quantises_the_layers_and_nothing_else(folder: Path) -> None:
    plain, found = load_model(folder), load_model(folder, quantization="nf4")
    assert is_quantized(found) and found.dtype == torch.bfloat16
    assert torch.equal(found.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(found.lm_head.weight, plain.lm_head.weight)
    before = logits(plain)
    quantize_linears(plain)
    assert torch.equal(logits(found), logits(plain))
    assert not torch.equal(logits(found), before)


def test_a_saved_model_opens_with_the_same_logits(folder: Path, nf4_folder: Path) -> None:
    found = load_model(nf4_folder)
    assert is_quantized(found)
    assert torch.equal(logits(found), logits(load_model(folder, quantization="nf4")))


def test_bitsandbytes_opens_it_with_the_same_logits(nf4_folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes")
    stock = AutoModelForCausalLM.from_pretrained(str(nf4_folder), dtype=torch.bfloat16)
    ours = logits(load_model(nf4_folder))
    torch.testing.assert_close(logits(stock), ours, rtol=2e-2, atol=2e-2 * float(ours.abs().max()))


def test_what_bitsandbytes_saves_opens_here(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes")
    from transformers import BitsAndBytesConfig

    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.bfloat16, quantization_config=asked
    )
    save_model(theirs, load_tokenizer(folder), tmp_path)
    expected, found = logits(theirs), load_model(tmp_path)
    assert is_quantized(found)
    torch.testing.assert_close(logits(found), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


# --- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
    ids=["gptq", "int8", "fp4"],
)
def test_other_quantisations_are_refused(folder: Path, tmp_path: Path, quantization: dict[str, Any]) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(UserError, match="quantized in a format other than"):
        load_model(other)


@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "o_proj.weight", "o_proj.weight.absmax", "o_proj.weight.nested_absmax"]
)
def test_missing_tensors_are_refused(nf4_folder: Path, tmp_path: Path, lost: str) -> None:
    other = Path(shutil.copytree(nf4_folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith(lost))
    del tensors[name]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        load_model(other)


# --- memory ------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch
from fettle.models.families import FAMILIES
from fettle.models.load import load_model

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

load_model(Path(sys.argv[1]), quantization="nf4")  # imports and caches
before = peak()
model = load_model(Path(sys.argv[2]), quantization="nf4")
print(peak() - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_the_quantised_model_and_one_tensor(small_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = causal_lm_class("llama")(config).to(torch.bfloat16)
    tensors = {
        name: torch.full(t.shape, 0.02, dtype=torch.bfloat16) for name, t in model.state_dict().items()
    }
    large = Path(shutil.copytree(small_model, tmp_path / "large"))
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(str(large))
    stored = (large / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small_model), str(large)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    growth, quantised = (int(word) for word in done.stdout.split())
    largest = 2 * 1024 * 4096
    assert growth < quantised + largest + 40 * 10**6 < 0.8 * stored


# --- the jobs ----------------------------------------------------------------------------------------------


def test_training_remembers_nf4_and_export_merges_onto_it(
    cli: Callable[..., Any], small_model: Path, chats: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = cli(
        *("train", "--model", small_model, "--data", chats, "--output", run, "--quantization", "nf4"),
        *("--max-steps", 4, "--learning-rate", 0.02, "--device", "cpu"),
    )
    assert ended.code == 0, ended.err
    assert json.loads((run / "fettle.json").read_text())["quantization"] == "nf4"

    model, _ = load(run, device="cpu")
    assert is_quantized(model)
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    dequantize_linears(model)
    torch.testing.assert_close(logits(model), expected)

    merged, _ = load(export_safetensors(run, tmp_path / "merged"), device="cpu")
    assert not is_quantized(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


def test_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{name}' contains NaN or Inf"):
        load_model(broken, quantization="nf4")


def test_a_config_that_claims_nf4_over_plain_weights(folder: Path, nf4_folder: Path, tmp_path: Path) -> None:
    false = shutil.copytree(folder, tmp_path / "false")
    shutil.copy(nf4_folder / "config.json", false)
    with pytest.raises(UserError, match="no tensor is stored in it"):
        load_model(false)


def test_a_part_that_is_too_short(nf4_folder: Path, tmp_path: Path) -> None:
    """A kernel would read beyond it."""
    short = shutil.copytree(nf4_folder, tmp_path / "short")
    tensors = load_file(short / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name][:-32].clone()
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="entries, not"):
        load_model(short)
