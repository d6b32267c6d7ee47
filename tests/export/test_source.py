"""The stream of a model's tensors is, tensor by tensor, the model that PEFT's own merge makes."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fettle.adapters.facts import AdapterFacts, write_facts
from fettle.adapters.load import load
from fettle.errors import UserError
from fettle.export.source import open_source
from fettle.models.checkpoint import fingerprint
from fettle.models.load import load_model, load_tokenizer
from fettle.models.quantized import save_nf4
from fettle.quantization.layers import dequantize_linears

KINDS = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "patterns": {"r": 4, "lora_alpha": 6, "rank_pattern": {"down_proj": 2}},
}


def save_adapter(base: Path, to: Path, **options) -> None:
    """A PEFT adapter with random weights, made by stock libraries."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(to)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_pefts_merge(kind: str, small_model: Path, tmp_path: Path) -> None:
    save_adapter(small_model, tmp_path / "adapter", **KINDS[kind])
    stock = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(stock, tmp_path / "adapter").merge_and_unload().state_dict()
    found = dict(open_source(tmp_path / "adapter").tensors())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), merged[name].float(), rtol=1e-5, atol=1e-6)
    assert {name for name in merged if name not in found} <= {"lm_head.weight"}  # where it is tied


def test_a_plain_model_is_itself(small_model: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).state_dict()
    source = open_source(small_model)
    for _ in range(2):  # every pass begins anew
        for name, tensor in source.tensors():
            assert torch.equal(tensor.float(), stock[name])
    assert source.name == small_model.name and source.stop_ids


def test_nf4_is_unpacked(small_model: Path, tmp_path: Path) -> None:
    model = load_model(small_model, quantization="nf4")
    save_nf4(model, load_tokenizer(small_model), tmp_path / "nf4")
    dequantize_linears(model)
    expected = model.state_dict()
    found = dict(open_source(tmp_path / "nf4").tensors())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name].float()), name


def test_an_adapter_trained_on_nf4_is_merged_onto_those_weights(small_model: Path, tmp_path: Path) -> None:
    save_adapter(small_model, tmp_path / "adapter", r=4, lora_alpha=6)
    facts = AdapterFacts(base_fingerprint=fingerprint(small_model), quantization="nf4")
    write_facts(tmp_path / "adapter", facts)
    model, _ = load(tmp_path / "adapter", device="cpu")
    dequantize_linears(model)
    merged = model.merge_and_unload().state_dict()
    for name, tensor in open_source(tmp_path / "adapter").tensors():
        torch.testing.assert_close(tensor.float(), merged[name].float(), rtol=1e-5, atol=1e-6)


def test_an_adapter_with_numbers_that_are_none_is_refused(small_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(small_model, tmp_path / "adapter", r=2, lora_alpha=2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="numbers that are none"):
        list(open_source(tmp_path / "adapter").tensors())


def test_an_adapter_for_another_base_is_refused(small_model: Path, tmp_path: Path) -> None:
    save_adapter(small_model, tmp_path / "adapter", r=2, lora_alpha=2)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "fettle-tiny"}))
    with pytest.raises(UserError, match="belongs to another model"):
        open_source(tmp_path / "adapter")
