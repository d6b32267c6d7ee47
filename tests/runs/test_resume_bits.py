"""A run that ended abruptly at any of its save points and was resumed has the bits of one that went through.

Here the end is an exception that no code catches, in this process; tests/runs/test_resume.py kills processes.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from fettle.methods.finetune import resume_training, train
from fettle.runs.options import TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

STEPS = 6
WAYS = {
    "without held-out rows": {"eval_fraction": 0.0},
    "with held-out rows": {"eval_fraction": 0.2},
    "evaluated between save points": {"eval_fraction": 0.2, "eval_steps": 1},
    "without packing": {"packing": False, "batch_size": 2, "eval_fraction": 0.0},
    "with rows to keep": {"keep_data": True, "eval_fraction": 0.0},
    "every layer recomputed": {"gradient_checkpointing": True, "eval_fraction": 0.0},
    "pairs, into a second epoch": {"method": "dpo", "batch_size": 4, "eval_fraction": 0.2},
    "pairs without dropout": {"method": "simpo", "batch_size": 4, "eval_fraction": 0.0, "dropout": 0.0},
    "labelled answers": {"method": "kto", "eval_fraction": 0.2},
    "several batches per step": {"gradient_accumulation_steps": 2, "max_length": 32},
}


@pytest.fixture(scope="module")
def dropping_model(small_model, tmp_path_factory):
    """The small model with dropout in its attention and on its residuals: random numbers in every layer."""
    import shutil

    folder = shutil.copytree(small_model, tmp_path_factory.mktemp("dropping") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.attention_dropout, config.resid_pdrop = 0.1, 0.1
    config.save_pretrained(folder)
    return folder


def compared(folder: Path, method: str) -> Path:
    """Rows of compared answers, of different lengths, in a file."""
    rows = []
    for n in range(18):
        good, bad = "Here is " + f"{n} " * (n % 5 + 1), "No."
        if method == "kto":
            rows += [
                {"prompt": f"Say {n}.", "completion": text, "label": text == good} for text in (good, bad)
            ]
        else:
            rows.append({"prompt": f"Say {n}.", "chosen": good, "rejected": bad})
    file = folder / "compared.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("way", WAYS)
def test_it_ends_in_the_same_bits(dropping_model, chats, tmp_path, killed_at_save, way):
    loop = {"max_steps": STEPS, "eval_steps": 4, "save_steps": 1, "samples": 1, "dropout": 0.1}
    changes = dict(WAYS[way])
    if changes.pop("keep_data", False):
        file = tmp_path / "kept.jsonl"
        file.write_text(json.dumps({"prompt": "Say 3.", "completion": "Here is 3!"}) + "\n")
        changes["keep_data"] = str(file)
    data = chats if "method" not in changes else compared(tmp_path, changes["method"])
    options = TrainOptions(
        model=str(dropping_model), data=str(data), output=str(tmp_path / "whole"), device="cpu",
        **(loop | changes),
    )  # fmt: skip
    train(options)
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name), "nothing was learned"

    # one run that ends abruptly after every step, and is resumed each time
    output = tmp_path / "killed"
    with killed_at_save(1):
        train(dataclasses.replace(options, output=str(output)))
    for step in range(2, STEPS):
        with killed_at_save(step):
            resume_training(output)
    resume_training(output)
    resumed = load_file(output / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
