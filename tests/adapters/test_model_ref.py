"""`load`: a full model, or an adapter that finds its base and makes sure that it is the one it knew."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fettle.adapters.lora import adapt
from fettle.checkpoints.adapter_facts import AdapterFacts, read_facts, write_facts
from fettle.checkpoints.fingerprint import fingerprint
from fettle.engine.load import load
from fettle.errors import UserError
from fettle.models.load import load_model
from fettle.models.save import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@torch.no_grad()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.fixture
def adapter_folder(base_folder: Path, randomise_adapter: Any, tmp_path: Path) -> Path:
    """As `fettle train` leaves it: trained on `base_folder`, with a note of its weights."""
    model, _ = load(base_folder, device="cpu")
    adapted = adapt(model, rank=4, alpha=6)
    randomise_adapter(adapted)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    write_facts(folder, AdapterFacts(base_fingerprint=fingerprint(base_folder), context_tokens=48))
    return folder


def test_a_full_model(base_folder: Path, phi3: Any, tokens: torch.Tensor) -> None:
    model, tokenizer = load(str(base_folder), device="cpu")
    assert isinstance(model, PreTrainedModel)
    assert torch.equal(logits_of(model, tokens), logits_of(phi3.stock, tokens))
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]


def test_an_adapter_finds_its_base(
    adapter_folder: Path, phi3: Any, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)  # the name it remembers must not depend on where one stands
    model, tokenizer = load(adapter_folder, device="cpu")
    assert isinstance(model, PeftModel)
    assert not model.training
    expected = PeftModel.from_pretrained(phi3.stock, adapter_folder).eval()
    torch.testing.assert_close(logits_of(model, tokens), logits_of(expected, tokens), rtol=0, atol=1e-5)
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]


def test_a_base_named_from_where_one_stood(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = load("base", device="cpu")
    adapt(model, rank=2).save_pretrained("adapter")
    monkeypatch.chdir(tmp_path.parent)
    assert isinstance(load(tmp_path / "adapter", device="cpu")[0], PeftModel)


def test_plain_peft_finds_the_base_too(adapter_folder: Path, tokens: torch.Tensor) -> None:
    """By the name that fettle wrote into adapter_config.json."""
    name = json.loads((adapter_folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), adapter_folder).eval()
    ours, _ = load(adapter_folder, device="cpu")
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(theirs, tokens), rtol=0, atol=1e-5)


def test_an_adapter_brings_the_context_it_was_trained_for(adapter_folder: Path) -> None:
    """LongRoPE's factors have to be those of the training run."""
    model, _ = load(adapter_folder, device="cpu")
    assert model.get_base_model().model.rotary_emb.context_tokens == 48
    (adapter_folder / "fettle.json").unlink()
    assert read_facts(adapter_folder) is None
    model, _ = load(adapter_folder, device="cpu")
    assert model.get_base_model().model.rotary_emb.context_tokens is None


def test_the_adapters_own_tokenizer_comes_first(adapter_folder: Path, tokenizer: Any) -> None:
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="w96", pad_token="<pad>")
    tokenizer.save_pretrained(adapter_folder)
    assert load(adapter_folder, device="cpu")[1].eos_token == "w96"


def test_a_dtype_is_for_the_base_alone(adapter_folder: Path) -> None:
    model, _ = load(adapter_folder, dtype="bfloat16", device="cpu")
    kinds = {(".lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_an_adapter_on_an_adapters_folder_as_base(adapter_folder: Path, tmp_path: Path) -> None:
    """The base has to be a full model; a chain of adapters is refused in a sentence."""
    second = tmp_path / "second"
    shutil.copytree(adapter_folder, second)
    rewrite_base(second, str(adapter_folder))
    with pytest.raises(UserError):
        load(second, device="cpu")


# --- the wrong base ----------------------------------------------------------------------------------------


def rewrite_base(folder: Path, name: str) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load(folder, device="cpu")
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_base_whose_weights_have_changed(adapter_folder: Path, base_folder: Path) -> None:
    file = base_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    message = refusal(adapter_folder)
    assert "different weights from those" in message
    assert str(base_folder) in message


def test_a_base_that_was_saved_again_is_still_the_same(
    adapter_folder: Path, base_folder: Path, tokenizer: Any
) -> None:
    """Only the weights count: not their order, the shards, or the config beside them."""
    model = load_model(base_folder)
    shutil.rmtree(base_folder)
    save_model(model, tokenizer, base_folder)
    (base_folder / "model.safetensors").unlink()
    model.save_pretrained(base_folder, max_shard_size="20kB")
    assert len(list(base_folder.glob("model-*.safetensors"))) > 1
    assert isinstance(load(adapter_folder, device="cpu")[0], PeftModel)


def test_an_adapter_without_a_note_is_taken_at_its_word(adapter_folder: Path) -> None:
    (adapter_folder / "fettle.json").unlink()
    assert isinstance(load(adapter_folder, device="cpu")[0], PeftModel)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"base_fingerprint": 3}'], ids=repr)
def test_a_note_that_is_broken(adapter_folder: Path, text: str) -> None:
    (adapter_folder / "fettle.json").write_text(text)
    refusal(adapter_folder)


def test_a_base_that_has_moved(adapter_folder: Path, base_folder: Path) -> None:
    base_folder.rename(base_folder.with_name("elsewhere"))
    message = refusal(adapter_folder)
    assert str(base_folder) in message
    assert "base_model_name_or_path" in message
    rewrite_base(adapter_folder, str(base_folder.with_name("elsewhere")))
    assert isinstance(load(adapter_folder, device="cpu")[0], PeftModel)


def test_a_base_of_another_shape(adapter_folder: Path, bases_of: Any, tokenizer: Any, tmp_path: Path) -> None:
    bases_of("phi3", hidden=64).stock.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    rewrite_base(adapter_folder, str(tmp_path / "wide"))
    refusal(adapter_folder)
    (adapter_folder / "fettle.json").unlink()
    message = refusal(adapter_folder)
    assert "another model" in message
    assert "64" in message
