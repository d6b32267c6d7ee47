"""Values in config.json and generation_config.json that real checkpoints have, and that none should have."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fettle.checkpoints.folder import inspect
from fettle.errors import UserError
from fettle.models.config import config_of
from fettle.models.families import FAMILIES
from fettle.models.load import load_model, load_tokenizer, read_generation, stored_model

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


@pytest.fixture
def folder_of(pair_of: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A family's checkpoint with changes to its config.json."""

    def make(family: str, **changes: Any) -> Path:
        pair_of(family).stock.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config = {name: value for name, value in config.items() if not name.startswith("rope_")}
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        return tmp_path

    return make


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model.eval()(ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_su_is_what_phi3_first_called_longrope(folder_of: Any, key: str) -> None:
    rope = FACTORS | {"type": "longrope"}
    folder = folder_of("phi3", original_max_position_embeddings=16, rope_scaling=rope)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = FACTORS | {key: "su"}
    (folder / "config.json").write_text(json.dumps(config))
    assert config_of(folder).config.rope_parameters["rope_type"] == "longrope"
    torch.testing.assert_close(logits_of(load_model(folder)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partial_rotation_counts_where_it_does_in_transformers(folder_of: Any, family: str) -> None:
    folder = folder_of(family, partial_rotary_factor=0.5)
    attention = "eager" if family == "gemma2" else None  # as in conftest.py: the fused one has no soft cap
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention))
    torch.testing.assert_close(logits_of(load_model(folder)), expected, rtol=0, atol=2e-5)


def test_gelu_in_a_gemma_config_is_its_tanh_approximation(folder_of: Any) -> None:
    """The first uploads of Gemma say gelu, which transformers 5.17 takes literally."""
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder_of("gemma")))
    folder = folder_of("gemma", hidden_act="gelu")
    assert config_of(folder).config.hidden_act == "gelu_pytorch_tanh"
    assert config_of(folder, is_plain=True).config.hidden_act == "gelu_pytorch_tanh"
    torch.testing.assert_close(logits_of(load_model(folder)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is larger than 1,000"),
        ({"vocab_size": 10**15}, "vocab_size is larger"),
        ({"hidden_size": 10**30}, "hidden_size is larger"),
        ({"rope_theta": "10000"}, "give no rotary frequencies"),
        ({"rope_theta": 0}, "do not fit heads"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "do not fit heads",
        ),
        ({"rope_scaling": {"type": "su", **FACTORS}}, "rope type 'su' is not supported"),
        ({"quantization_config": "nf4"}, "quantization_config is not a JSON object"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_theta is inf"),
        ({"attention_dropout": 5}, "attention_dropout is 5"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused_from_the_file_alone(
    folder_of: Any, changes: dict[str, Any], message: str
) -> None:
    folder, began = folder_of("llama", **changes), time.process_time()
    for is_plain in (False, True):  # as `fettle plan` reads it
        with pytest.raises(UserError, match=message):
            config_of(folder, is_plain=is_plain)
    with pytest.raises(UserError, match=message):
        stored_model(inspect(folder))
    assert time.process_time() - began < 1


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_attention_to_later_tokens_is_refused(folder_of: Any, family: str) -> None:
    folder = folder_of(family, use_bidirectional_attention=True)
    for is_plain in (False, True):
        with pytest.raises(UserError, match="use_bidirectional_attention is on, but fettle trains causal"):
            config_of(folder, is_plain=is_plain)


def test_a_billion_labels_are_passed_over(folder_of: Any) -> None:
    """They are for classifiers; transformers makes a name for each."""
    folder, began = folder_of("llama", num_labels=10**9), time.process_time()
    assert stored_model(inspect(folder)).config.vocab_size == config_of(folder).config.vocab_size
    assert time.process_time() - began < 2


def test_layers_are_counted_before_a_model_is_described(folder_of: Any) -> None:
    folder, began = folder_of("llama", num_hidden_layers=1000), time.process_time()
    with pytest.raises(UserError, match=r"the weights have 3 layers, but config\.json says 1000"):
        stored_model(inspect(folder))
    assert time.process_time() - began < 1


def test_numbers_of_thousands_of_digits_are_one_sentence(folder_of: Any) -> None:
    folder = folder_of("llama")
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}")
    for read in (config_of, inspect):
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            read(folder)


def test_tokens_without_rows_are_refused(small_model: Path, tmp_path: Path) -> None:
    tokenizer, stored = load_tokenizer(small_model), stored_model(inspect(small_model))
    tokenizer.add_tokens(["<city>", "</city>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"2 of the tokenizer's tokens have no row .*'<city>'"):
        load_tokenizer(tmp_path, stored.config)


@pytest.mark.parametrize("length", ["4096", {"a": 1}])
def test_a_tokenizer_that_fails_only_when_it_is_used_is_refused(
    small_model: Path, tmp_path: Path, length: Any
) -> None:
    load_tokenizer(small_model).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_several_chat_templates_need_a_default(small_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "rag": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"named rag, tool_use, but none is named default"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"temperature": 0.6},
        {"length_penalty": 2.0, "early_stopping": True},
        {"pad_token_id": -1},
        {"use_cache": False, "cache_implementation": "static"},
        {"output_scores": True},
        {"do_sample": True, "temperature": 0.6},
    ],
    ids=str,
)
def test_a_generation_config_can_be_saved_again(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content | {"eos_token_id": 2}))
    generation = read_generation(tmp_path)
    assert generation is not None
    generation.eos_token_id = [2, 3]  # what exporting adds
    generation.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.eos_token_id == [2, 3]
    assert again.temperature == (0.6 if content.get("do_sample") else None)


@pytest.mark.parametrize("content", ['{"max_new_tokens": -1}', "[]", "{", '{"pad_token_id": "x"}'])
def test_a_generation_config_that_transformers_does_not_take_is_one_sentence(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json cannot be used"):
        read_generation(tmp_path)
