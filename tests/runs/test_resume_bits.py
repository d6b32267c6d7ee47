"""A run that ended abruptly at any of its save points and was resumed has the bits of one that went through.

Here the end is an exception that no code catches, in this process; tests/training/test_resume.py kills processes.
"""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig

from fettle.methods.sft import resume_training, train
from fettle.runs.options import TrainOptions
from fettle.runs.resume import MarkComplete

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

STEPS = 6
WAYS = {
    "without held-out rows": {"eval_fraction": 0.0},
    "with held-out rows": {"eval_fraction": 0.2},
    "evaluated between save points": {"eval_fraction": 0.2, "eval_steps": 1},
    "without packing": {"packing": False, "batch_size": 2, "eval_fraction": 0.0},
    "with rows to keep": {"keep_data": True, "eval_fraction": 0.0},
    "every layer recomputed": {"gradient_checkpointing": True, "eval_fraction": 0.0},
    "several batches per step": {"gradient_accumulation_steps": 2, "max_length": 32},
}


class Killed(BaseException):
    """Stands for kill -9: no code of the run sees it."""


@pytest.fixture(scope="module")
def dropping_model(small_model, tmp_path_factory):
    """The small model with dropout in its attention and on its residuals: random numbers in every layer."""
    import shutil

    folder = shutil.copytree(small_model, tmp_path_factory.mktemp("dropping") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.attention_dropout, config.resid_pdrop = 0.1, 0.1
    config.save_pretrained(folder)
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.parametrize("way", WAYS)
def test_it_ends_in_the_same_bits(dropping_model, chats, tmp_path, monkeypatch, way):
    loop = {"max_steps": STEPS, "eval_steps": 4, "save_steps": 1, "samples": 1, "dropout": 0.1}
    changes = dict(WAYS[way])
    if changes.pop("keep_data", False):
        file = tmp_path / "kept.jsonl"
        file.write_text(json.dumps({"prompt": "Say 3.", "completion": "Here is 3!"}) + "\n")
        changes["keep_data"] = str(file)
    options = TrainOptions(
        model=str(dropping_model), data=str(chats), output=str(tmp_path / "whole"), device="cpu",
        **(loop | changes),
    )  # fmt: skip
    train(options, console=quiet())
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name), "nothing was learned"

    # one run that ends abruptly after every step, and is resumed each time
    output, step = tmp_path / "killed", 0
    on_save = MarkComplete.on_save

    def mark_then_die(callback, args, state, control, **kwargs):
        on_save(callback, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MarkComplete, "on_save", mark_then_die)
        step = 1
        with pytest.raises(Killed):
            train(dataclasses.replace(options, output=str(output)), console=quiet())
        for step in range(2, STEPS):  # noqa: B007  # mark_then_die reads it
            with pytest.raises(Killed):
                resume_training(output, console=quiet())
    resume_training(output, console=quiet())
    resumed = load_file(output / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
