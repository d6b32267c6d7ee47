"""The stream of a model's tensors is, tensor by tensor, the model that PEFT's own merge makes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fettle.checkpoints.adapter_facts import AdapterFacts, write_facts
from fettle.checkpoints.fingerprint import fingerprint
from fettle.engine.load import load
from fettle.errors import UserError
from fettle.export.gguf import export_adapter_gguf, export_gguf, verify
from fettle.export.source import open_source
from fettle.models.load import load_model, load_tokenizer
from fettle.models.quantized import save_nf4
from fettle.models.save import save_model
from fettle.quantization.layers import dequantize_linears
from fettle.quantization.nf4 import Nf4Linear, dense_weight

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj": 2}},
    "biases": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"r": 4, "target_modules": ["o_proj", "embed_tokens"]},
    "parameters": {"r": 4, "target_modules": ["o_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "head": {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["o_proj"]},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
}


def save_adapter(base: Path, to: Path, **options) -> None:
    """A PEFT adapter with random weights, made by stock libraries."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    usual = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    adapted = get_peft_model(model, LoraConfig(**usual | options))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=0.05)
        elif "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(to)


def tied(folder: Path, to: Path) -> Path:
    """The checkpoint with its embedding as output head."""
    model = load_model(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    save_model(model, load_tokenizer(folder), to)
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_pefts_merge(kind: str, gguf_pair: Any, tmp_path: Path) -> None:
    save_adapter(gguf_pair.folder, tmp_path / "adapter", **KINDS[kind])
    stock = AutoModelForCausalLM.from_pretrained(gguf_pair.folder, dtype=torch.float32)
    merged = PeftModel.from_pretrained(stock, tmp_path / "adapter").merge_and_unload().state_dict()
    found = dict(open_source(tmp_path / "adapter").tensors())
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), merged[name].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lora", "rank-stabilised")])
def test_what_is_more_than_plain_lora_is_no_adapter_for_llama_cpp(kind, gguf_pair, tmp_path) -> None:
    save_adapter(gguf_pair.folder, tmp_path / "adapter", **KINDS[kind])
    with pytest.raises(UserError, match="plain LoRA"):
        export_adapter_gguf(tmp_path / "adapter", tmp_path / "a.gguf")


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings")
def test_an_adapted_head_that_is_the_embedding_is_refused(gguf_pair: Any, tmp_path: Path) -> None:
    base = tied(gguf_pair.folder, tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", r=2, target_modules=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if ".lora_" in name}, file)
    with pytest.raises(UserError, match="'lm_head', which is tied to the embedding"):
        open_source(tmp_path / "adapter")


@pytest.mark.filterwarnings(
    "ignore:Model (has|with) .tie_word_embeddings", "ignore:Input and output embeddings"
)
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_head_trained_beside_a_tied_embedding_is_in_the_gguf_file(module, gguf_pair, tmp_path) -> None:
    base = tied(gguf_pair.folder, tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", r=2, target_modules=["o_proj"], modules_to_save=[module])
    export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", quantizations=["f32"])
    model, tokenizer = load(tmp_path / "adapter", device="cpu")
    assert verify(tmp_path / "m.gguf", model, tokenizer, texts=["one"]).kl < 1e-5


def test_a_plain_model_is_itself(small_model: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).state_dict()
    source = open_source(small_model)
    for _ in range(2):  # every pass begins anew
        for name, tensor in source.tensors():
            assert torch.equal(tensor.float(), stock[name])
    assert source.name == small_model.name and source.stop_ids


def test_a_model_is_named_as_its_user_names_it(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the hash of a hub's snapshot."""
    monkeypatch.setattr("fettle.adapters.model_ref.locate", lambda name, **_: small_model)
    assert open_source("somebody/their-model").name == "their-model"


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, "x"]}'])
def test_a_broken_generation_config_is_named(text, small_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(small_model, tmp_path / "base")
    (base / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        open_source(base)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_model_with_numbers_that_are_none_is_refused(value, small_model: Path, tmp_path: Path) -> None:
    model = load_model(small_model)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    save_model(model, load_tokenizer(small_model), tmp_path / "base")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight contains NaN or Inf"):
        list(open_source(tmp_path / "base").tensors())


@pytest.mark.parametrize("is_sharded", [False, True])
def test_nf4_is_unpacked(is_sharded: bool, small_model: Path, tmp_path: Path) -> None:
    """A matrix and its scales may lie in different files."""
    model = load_model(small_model, quantization="nf4")
    save_nf4(model, load_tokenizer(small_model), folder := tmp_path / "nf4")
    if is_sharded:
        reshard(folder)
    dequantize_linears(model)
    expected = model.state_dict()
    found = dict(open_source(folder).tensors())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].float()), name


def reshard(folder: Path) -> None:
    """Deal the tensors out to two files, one after the other."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def plain_layer(layer: Nf4Linear) -> torch.nn.Linear:
    dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight.data = dense_weight(layer) * 1.01
    return dense


@pytest.mark.parametrize("is_stored_so", [False, True])
def test_an_adapter_trained_on_nf4_is_merged_onto_those_weights(is_stored_so, small_model, tmp_path) -> None:
    save_adapter(base := small_model, tmp_path / "adapter", r=4, lora_alpha=6)
    if is_stored_so:
        base = tmp_path / "nf4"
        model = load_model(small_model, quantization="nf4")
        down = model.model.layers[0].mlp.down_proj  # one that a checkpoint keeps dense
        model.set_submodule("model.layers.0.mlp.down_proj", plain_layer(down))
        save_nf4(model, load_tokenizer(small_model), base)
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    facts = AdapterFacts(base_fingerprint=fingerprint(base), quantization="nf4")
    write_facts(tmp_path / "adapter", facts)
    model, _ = load(tmp_path / "adapter", device="cpu")
    dequantize_linears(model)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in open_source(tmp_path / "adapter").tensors():
        torch.testing.assert_close(tensor.float(), merged[name].float(), rtol=1e-5, atol=1e-6)


def test_the_type_to_be_written_does_not_change_what_nf4_held_in_training(small_model, tmp_path) -> None:
    save_adapter(small_model, tmp_path / "adapter", r=4, lora_alpha=6)
    write_facts(
        tmp_path / "adapter", AdapterFacts(base_fingerprint=fingerprint(small_model), quantization="nf4")
    )
    source = open_source(tmp_path / "adapter")
    expected = dict(source.tensors())
    source.dtype = torch.bfloat16
    for name, tensor in source.tensors():
        assert torch.equal(tensor, expected[name]), name


def change(adapter: Path, **entries: Any) -> None:
    """Give the adapter's config other entries."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def without(adapter: Path, words: str) -> None:
    """Take the adapter's tensors whose names hold these words out."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if words not in name}, file)


def put_nan(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)


FAULTS: dict[str, tuple[Any, str]] = {
    "not a number": (put_nan, "contains NaN or Inf"),
    "a layer left out": (lambda folder: without(folder, "layers.1"), "is missing from its weights"),
    "half a product": (
        lambda folder: without(folder, "layers.0.mlp.down_proj.lora_B"),
        "missing from its weights",
    ),
    "another rank": (lambda folder: change(folder, r=1), r"has shape \(2, .* implies \(1, "),
    "rank 0": (lambda folder: change(folder, r=0), "adapter_config.json: .*positive integer"),
    "alpha a word": (lambda folder: change(folder, lora_alpha="x"), "adapter_config.json: "),
    "another base": (
        lambda folder: write_facts(folder, AdapterFacts(base_fingerprint="0" * 64)),
        "trained on different weights from those",
    ),
    "a broken note": (lambda folder: (folder / "fettle.json").write_text("{"), "is malformed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_refused_whatever_it_becomes(fault, small_model: Path, tmp_path: Path) -> None:
    save_adapter(small_model, adapter := tmp_path / "adapter", r=2, lora_alpha=2)
    change_it, message = FAULTS[fault]
    change_it(adapter)
    with pytest.raises(UserError, match=message):
        list(open_source(adapter).tensors())
    with pytest.raises(UserError, match=message):
        export_adapter_gguf(adapter, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_for_another_base_is_refused(small_model: Path, tmp_path: Path) -> None:
    save_adapter(small_model, tmp_path / "adapter", r=2, lora_alpha=2)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "fettle-tiny"}))
    with pytest.raises(UserError, match=r"belongs to another model.* but its base has"):
        open_source(tmp_path / "adapter")
