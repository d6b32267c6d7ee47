"""What `fettle plan` makes of the folders it may be given: configs that are wrong, quantised, or not there."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from fettle.adapters.model_ref import resolve
from fettle.engine.load import load
from fettle.errors import UserError
from fettle.methods import finetune
from fettle.models.config import config_of
from fettle.models.save import save_model
from fettle.runs import memory_plan as planning
from fettle.runs.memory_plan import _adapted_matrices
from fettle.runs.options import PlanOptions, TrainOptions

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def model_with(small_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with the small model's config alone, some of its values replaced; None takes one out."""

    def make(**values: object) -> Path:
        content = json.loads((small_model / "config.json").read_text()) | values
        kept = {name: value for name, value in content.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return tmp_path

    return make


SIZES = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]


@pytest.mark.parametrize("value", [-3, 0, 2.5, "many", True])
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads"])
def test_a_size_that_is_none(cli, model_with, name, value):
    ended = cli("plan", "--model", model_with(**{name: value}), "--device", "cpu")
    assert ended.code == 2 and f"{name} is {value!r}; expected a whole number" in ended.err


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_not_guessed(cli, model_with, name):
    ended = cli("plan", "--model", model_with(**{name: None}), "--device", "cpu")
    assert ended.code == 2 and f"{name} is missing" in ended.err


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_weights_that_train_refuses_are_not_planned(cli, model_with, method):
    folder = model_with(quantization_config={"quant_method": method})
    ended = cli("plan", "--model", folder, "--device", "cpu")
    assert ended.code == 2 and "quantized in a format other than" in ended.err


@pytest.mark.parametrize("options", [[], ["--quantization", "nf4"]])
def test_stored_nf4_is_planned_as_it_is_held(cli, model_with, options):
    folder, common = model_with(quantization_config=NF4), ("--device", "cpu", "--json")
    stored = json.loads(cli("plan", "--model", folder, *options, *common).out)
    asked = json.loads(cli("plan", "--model", model_with(), "--quantization", "nf4", *common).out)
    assert stored["memory_bytes"]["weights"] == asked["memory_bytes"]["weights"]


def test_an_adapter_stands_for_its_base(trained: Path, small_model: Path):
    found = resolve(trained, need="config").stored_by_config().config
    assert found.to_dict() == config_of(small_model).config.to_dict()


def test_an_adapter_whose_base_is_gone(cli, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone"}))
    ended = cli("plan", "--model", tmp_path / "run", "--device", "cpu")
    assert ended.code == 2 and "is an adapter for '/gone'" in ended.err


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_stopped_run_is_to_be_finished(cli, tmp_path, command):
    (tmp_path / "run.yaml").write_text(f"# Repeat this run: fettle {command} --config run.yaml\n")
    ended = cli("plan", "--model", tmp_path, "--device", "cpu")
    assert ended.code == 2 and f"fettle {command} --resume --output {tmp_path}" in ended.err


def test_the_plan_says_what_it_is_for(cli, small_model):
    ended = cli("plan", "--model", small_model, "--rank", 4, "--dtype", "bfloat16", "--device", "cpu")
    assert ended.out.splitlines()[0].strip() == "memory on cpu: rank 4, bfloat16"


def test_every_option_of_plan_is_one_of_train():
    """What can be planned can be run; only a plan has a row length of its own and an output as JSON."""
    planned, trained = (
        {field.name for field in dataclasses.fields(kind)} for kind in (PlanOptions, TrainOptions)
    )
    assert planned - trained == {"context", "json"}


@pytest.mark.parametrize("target", ["layers.1.mlp.down_proj", "mlp.down_proj"])
def test_a_run_with_targets_that_name_a_place(cli, small_model, chats, tmp_path, target):
    words = ("train", "--model", small_model, "--data", chats, "--output", tmp_path / "out", "--max-steps", 1)
    ended = cli(*words, "--target-modules", target, "--samples", 1, "--device", "cpu", "--memory", "900GB")
    assert ended.code == 0, ended.err
    assert "the memory budget of 900GB exceeds the" in ended.out


def test_targets_are_counted_as_peft_finds_them():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 10}
    config = LlamaConfig(**sizes, num_hidden_layers=3)
    found = _adapted_matrices(config, ["layers.1.mlp.down_proj", "down_proj", "layers.0.self_attn.q_proj"])
    assert found == {"down_proj": 3, "q_proj": 1}
    assert _adapted_matrices(config, ["layers.1.mlp.down_proj"]) == {"down_proj": 1}
    with pytest.raises(UserError, match=r"^target_modules: the model has no linear layer 'x'; it has q_proj"):
        _adapted_matrices(config, ["down_proj", "x"])


def planned(cli, folder, *options) -> dict:
    ended = cli("plan", "--model", folder, "--device", "cpu", "--json", *options)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_what_is_adapted_and_redone_changes_the_plan_as_it_does_the_run(cli, small_model):
    whole, some = planned(cli, small_model), planned(cli, small_model, "--target-modules", "o_proj")
    assert some["memory_bytes"]["adapters"] < whole["memory_bytes"]["adapters"] / 4
    redone = planned(cli, small_model, "--gradient-checkpointing")
    assert set(redone["layers"]) <= {"keep_attention", "redo"}
    dropped, kept = (
        planned(cli, small_model, "--no-gradient-checkpointing", "--dropout", x) for x in (0.1, 0)
    )
    assert dropped["memory_bytes"]["activations"] > kept["memory_bytes"]["activations"]


@pytest.mark.parametrize(
    ("stored", "asked", "held"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float32"),
        ("float32", "auto", "float32"),
        (None, "auto", "float32"),
        ("float16", "bfloat16", "bfloat16"),
    ],
)
def test_weights_are_planned_in_the_type_that_train_holds_them_in(cli, model_with, stored, asked, held):
    folder = model_with(dtype=stored, torch_dtype=None)
    plain = cli("plan", "--model", folder, "--dtype", asked, "--device", "cpu")
    assert plain.out.splitlines()[0].strip() == f"memory on cpu: rank 16, {held}"
    nf4 = planned(cli, folder, "--dtype", asked, "--quantization", "nf4")
    assert nf4["has_outer_embedding"] is ((stored or held) == held), (
        "in its file only where it is stored as it is held"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_plan_and_run_agree_on_the_weights(cli, small_model, chats, tmp_path, dtype):
    folder = tmp_path / "model"
    model, tokenizer = load(small_model, dtype=dtype)
    save_model(model, tokenizer, folder)
    words = ("--data", chats, "--output", tmp_path / "out", "--max-steps", 1, "--samples", 1)
    run = cli("train", "--model", folder, "--quantization", "nf4", "--device", "cpu", *words)
    plan = cli("plan", "--model", folder, "--quantization", "nf4", "--device", "cpu")
    told = [
        [
            line.split()
            for line in ended.out.splitlines()
            if re.match(r" *(memory on|weights|embedding)", line)
        ]
        for ended in (run, plan)
    ]
    assert told[0] == told[1] and len(told[0]) == 2 + (dtype != "float16")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--memory", "50MB"), "this run needs at least"),
        (("--target-modules", "q_proj"), "no linear layer 'q_proj'"),
        (("--target-modules", "lm_head"), "'lm_head' is the model's output head"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_what_cannot_be_is_refused_before_anything_is_timed_or_loaded(
    cli, small_model, chats, tmp_path, monkeypatch, command, option, says
):
    monkeypatch.setattr(planning, "device_rates", None)
    monkeypatch.setattr(finetune, "load_model", None)
    data = ("--data", chats, "--output", tmp_path / "out") if command == "train" else ()
    ended = cli(command, "--model", small_model, "--device", "cpu", *data, *option)
    assert ended.code == 2 and says in ended.err


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize("amount", ["lots", "-5GB", "0.5b"])
def test_a_malformed_budget_is_refused_before_the_libraries_are_imported(command, amount):
    words = [command, "--model", "x", "--memory", amount]
    words += ["--data", "x", "--output", "x"] if command == "train" else []
    program = f"import sys; from fettle.cli import main; code = main({words}); "
    program += "assert 'torch' not in sys.modules; sys.exit(code)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2 and f"--memory is '{amount}'; expected an amount of memory" in ended.stderr
