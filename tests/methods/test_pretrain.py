"""A new model from nothing: a full checkpoint that stock transformers opens."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fettle.methods.pretrain import new_model, pretrain, resume_pretraining
from fettle.models.families import FAMILIES
from fettle.runs.options import PretrainOptions
from fettle.tiny.tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 2,
    "heads": 4,
    "key_value_heads": 2,
    "context": 128,
}


@pytest.fixture(scope="module")
def outcome(chats, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrain") / "out"
    options = PretrainOptions(
        data=str(chats),
        output=str(output),
        max_steps=60,
        learning_rate=0.01,
        samples=2,
        device="cpu",
        save_dtype="float32",
        **SIZES,
    )
    return pretrain(options)


def test_it_learns(outcome):
    losses = [loss for _, loss in outcome.report.loss_curve]
    assert losses[0] == pytest.approx(math.log(300), rel=0.1)  # knows nothing
    assert losses[-1] < 0.3 * losses[0]
    assert outcome.after.held_out["loss"] < 0.5 * outcome.before.held_out["loss"]


def test_stock_transformers_opens_it_and_it_answers(outcome, cli):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(outcome.output).eval(),
        AutoTokenizer.from_pretrained(outcome.output),
    )
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert len(tokenizer) == model.config.vocab_size <= 300
    assert (model.config.num_key_value_heads, model.config.max_position_embeddings) == (2, 128)
    messages = [{"role": "user", "content": "Say 7."}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.startswith("Here")
    assert len(output[0]) < ids.shape[1] + 20, "it does not stop by itself"
    words = ("generate", "--model", outcome.output, "--prompt", "Say 7.", "--max-new-tokens", 20)
    assert cli(*words).out == answer + "\n"


def test_embedding_and_head_are_one(outcome):
    weights = load_file(outcome.output / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert json.loads((outcome.output / "config.json").read_text())["tie_word_embeddings"] is True


def test_it_can_be_fine_tuned(outcome, cli, chats, tmp_path):
    words = ("train", "--model", outcome.output, "--data", chats, "--output", tmp_path / "out")
    assert cli(*words, "--max-steps", 1, "--samples", 0).code == 0


def test_the_written_options_repeat_it_bit_for_bit(outcome, cli, tmp_path):
    again = cli("pretrain", "--config", outcome.output / "run.yaml", "--output", tmp_path / "again")
    assert again.code == 0, again.err
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (outcome.output / name).read_bytes()
    assert resume_pretraining(tmp_path / "again") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_made_and_saved(chats, cli, tmp_path, family):
    sizes = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value)]
    words = ("pretrain", "--data", chats, "--output", tmp_path / "out", "--family", family, *sizes)
    ended = cli(*words, "--max-steps", 2, "--samples", 0, "--eval-fraction", 0)
    assert ended.code == 0, ended.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == FAMILIES[family].architecture
    assert model.dtype == torch.bfloat16


def test_a_new_model_is_the_same_for_the_same_seed():
    tokenizer = train_tokenizer(["some words"], 300)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(new_model(PretrainOptions(data="", output="", **SIZES), tokenizer).state_dict())
    first, same, other = models
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
