"""TRL's preference trainer on fettle's model takes the steps that it takes on the stock one."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from fettle.adapters.lora import adapt
from fettle.models.decoder import causal_lm_class

CONFIG = MistralConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=40, sliding_window=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
PAIRS = [
    {"prompt": "w2 w3 w4 w5", "chosen": " w6 w7", "rejected": " w8 w9 w10 w11"},
    {"prompt": "w12 w13", "chosen": " w14 w15 w16 w17 w18 w19 w20 w21 w22 w23", "rejected": " w24"},
] * 3


def preference_losses(model: torch.nn.Module, folder: Path) -> list[float]:
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 40)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B too, so that the adapters matter from the first step
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, save_strategy="no",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_preference_training_equals_the_stock_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(CONFIG)
    ours = causal_lm_class("mistral")(CONFIG)
    ours.load_state_dict(stock.state_dict())
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    expected = preference_losses(get_peft_model(stock, lora), tmp_path / "stock")
    found = preference_losses(adapt(ours, rank=4), tmp_path / "ours")
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == len(expected)
