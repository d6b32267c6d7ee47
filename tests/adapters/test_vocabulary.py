"""Adapters trained on a grown vocabulary, against PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fettle.engine.load import load
from fettle.errors import UserError
from fettle.export.checkpoint import export_safetensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings(
        "ignore:(Setting .save_embedding_layers|Model has .tie_word|Input and output)"
    ),
]

ROWS = 99
WAYS: dict[str, dict[str, Any]] = {
    "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "resized": {},
    "lora": {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [97, 98]},
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def grown(
    request: pytest.FixtureRequest, bases_of: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> Callable[..., Any]:
    """`grown(way, **options of save_pretrained)`: PEFT's model with two new tokens, saved in tmp_path/adapter."""

    def make(way: str, **saving: Any) -> Any:
        stock = bases_of("llama").stock
        stock.config.tie_word_embeddings = request.param
        stock.tie_weights()
        stock.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(ROWS, mean_resizing=False)
        options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "o_proj"]} | WAYS[way]
        adapted = get_peft_model(model, LoraConfig(**options)).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(tmp_path / "adapter", **saving)
        words = AutoTokenizer.from_pretrained(tmp_path / "base")
        words.add_tokens(["w97", "w98"])
        words.save_pretrained(tmp_path / "adapter")
        return adapted

    return make


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([[1, 5, 97, 9, 98, 3]]), use_cache=False).logits
    return logits


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_with_its_own_rows_is_loaded_and_merged(grown: Any, tmp_path: Path, way: str) -> None:
    expected = grown(way)
    model, tokenizer = load(tmp_path / "adapter", device="cpu")
    assert tokenizer("w98")["input_ids"] == [98]
    torch.testing.assert_close(logits_of(model), logits_of(expected), rtol=0, atol=1e-5)
    if way == "lora" and model.config.tie_word_embeddings:
        return  # two updates of one matrix: merging refuses it
    merged = AutoModelForCausalLM.from_pretrained(
        export_safetensors(tmp_path / "adapter", tmp_path / "merged")
    )
    torch.testing.assert_close(logits_of(merged.eval()), logits_of(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", ["resized", "lora"])
def test_an_adapter_without_them_is_refused(grown: Any, tmp_path: Path, way: str) -> None:
    grown(way, save_embedding_layers=False)
    for use in (load, lambda name: export_safetensors(name, tmp_path / "merged")):
        with pytest.raises(UserError, match="save_embedding_layers=True"):
            use(tmp_path / "adapter")
