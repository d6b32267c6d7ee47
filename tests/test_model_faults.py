"""Models that cannot answer anything: weights of NaN, and chat templates without end. Every command says so at once."""

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from fettle.data import template
from fettle.engine.load import load
from fettle.engine.request import Sampling
from fettle.engine.text import generate
from fettle.export.gguf import export_gguf

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS += "{% for m in messages %}{{ m.content }}{% endfor %}"
COMMANDS = ["generate", "chat", "train", "compare"]
NAN = "the model's logits are NaN or Inf"
STOPPED = "the chat template was stopped because, on one chat, it takes more than"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open("w") as lines:
        for n in range(12):
            turns = {"user": f"Say {n}.", "assistant": f"Here is {n}!"}
            chat = [{"role": role, "content": content} for role, content in turns.items()]
            lines.write(json.dumps({"messages": chat}) + "\n")
    return file


@pytest.fixture(scope="module")
def gguf(small_model, tmp_path_factory):
    return export_gguf(small_model, tmp_path_factory.mktemp("gguf") / "m.gguf", quantizations=["f16"])[0]


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "CPU_SECONDS", 0.3)
        template._renderer.close()
        yield
        template._renderer.close()


def run(cli, command, model, rows, folder):
    words = {
        "generate": ("generate", "--model", model, "--prompt", "Say 3."),
        "chat": ("chat", "--model", model),
        "compare": ("compare", model, model, "--data", rows),
        "train": ("train", "--model", model, "--data", rows, "--output", folder / "out", "--max-steps", 2),
    }
    return cli(*words[command], stdin="Say 3.\nSay 4.\n")


def damaged(folder, copy):
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_nan(cli, command, small_model, rows, tmp_path) -> None:
    model = damaged(small_model, tmp_path / "nan")
    code, out, err = run(cli, command, model, rows, tmp_path)
    assert code == 2 and err.count("fettle: error:") == 1
    assert (NAN in err and str(model) in err) or (command == "train" and "the loss is nan at step 1" in err)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert out.strip() == "" or command == "train"


def test_weights_of_nan_found_by_the_answers_before_training(cli, small_model, rows, tmp_path) -> None:
    model = damaged(small_model, tmp_path / "nan")
    to = tmp_path / "out"
    code, _, err = cli("train", "--model", model, "--data", rows, "--output", to, "--eval-fraction", "0.5")
    assert code == 2 and NAN in err and not (to / "adapter_config.json").exists()


@pytest.mark.parametrize("temperature", ["0", "0.7", "1e-30"])
def test_weights_of_nan_when_sampling(cli, temperature, small_model, tmp_path) -> None:
    model = damaged(small_model, tmp_path / "nan")
    code, _, err = cli("generate", "--model", model, "--prompt", "Say 3.", "--temperature", temperature)
    assert code == 2 and NAN in err


def test_a_tiny_temperature_is_no_fault_of_the_model(small_model) -> None:
    model, tokenizer = load(small_model)
    coldest = Sampling(max_new_tokens=4, temperature=1e-45, seed=0)
    assert generate(model, tokenizer, "Say 3.", sampling=coldest) == generate(
        model, tokenizer, "Say 3.", sampling=Sampling(max_new_tokens=4)
    )


@pytest.mark.parametrize("command", ["generate", "chat", "compare"])
def test_a_gguf_file_with_weights_of_nan(cli, command, gguf, rows, tmp_path) -> None:
    model = shutil.copy(gguf, tmp_path / "nan.gguf")
    (tensor,) = [t for t in GGUFReader(model, "r+").tensors if t.name == "blk.0.ffn_down.weight"]
    tensor.data[0] = np.nan
    tensor.data.base.flush()
    code, _, err = run(cli, command, model, rows, tmp_path)
    assert code == 2 and NAN in err and str(model) in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_template_without_end(cli, quick, command, small_model, rows, tmp_path) -> None:
    model = tmp_path / "endless"
    shutil.copytree(small_model, model)
    (model / "chat_template.jinja").write_text(ENDLESS)
    code, out, err = run(cli, command, model, rows, tmp_path)
    assert code == 2 and err.count("fettle: error:") == 1
    assert f"{model / 'chat_template.jinja'}: {STOPPED}" in err
    assert not (tmp_path / "out").exists()
    assert out.strip() == ""


@pytest.mark.parametrize("command", ["generate", "chat", "compare"])
def test_a_gguf_file_with_a_template_without_end(cli, quick, command, small_model, rows, tmp_path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(small_model, folder)
    brief = ENDLESS.replace("99999", "1    ")
    (folder / "chat_template.jinja").write_text(brief)
    (model,) = export_gguf(folder, tmp_path / "endless.gguf", quantizations=["f16"])
    model.write_bytes(model.read_bytes().replace(brief.encode(), ENDLESS.encode()))
    code, _, err = run(cli, command, model, rows, tmp_path)
    assert code == 2 and f"{model}: {STOPPED}" in err


def test_no_modelfile_from_a_template_without_end(cli, quick, small_model, tmp_path) -> None:
    model = tmp_path / "endless"
    shutil.copytree(small_model, model)
    (model / "chat_template.jinja").write_text(ENDLESS)
    to = tmp_path / "out" / "m.gguf"
    code, _, err = cli("export", "--model", model, "--format", "gguf", "--to", to, "--ollama")
    assert code == 2 and STOPPED in err
    assert not list(tmp_path.glob("out/*"))
