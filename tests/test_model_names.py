"""What `--model` names: every command answers the same fault with the same sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fettle.checkpoints.adapter_facts import AdapterFacts, write_facts

COMMANDS = {
    "train": "train --model {model} --data {chats} --output {here}/new",
    "plan": "plan --model {model} --device cpu",
    "plan targets": "plan --model {model} --device cpu --target-modules o_proj",
    "generate": "generate --model {model} --prompt Hi",
    "chat": "chat --model {model}",
    "compare first": "compare {model} {sound} --data {chats}",
    "compare second": "compare {sound} {model} --data {chats}",
    "export": "export --model {model} --to {here}/new",
    "export w4a16": "export --model {model} --to {here}/new --format w4a16 --data {chats}",
    "export gguf": "export --model {model} --to {here}/new.gguf --format gguf",
    "export adapter": "export --model {model} --to {here}/new.gguf --format adapter-gguf",
    "export push": "export --model {model} --to {here}/new --push me/mine",
}
PLANS = {"plan", "plan targets"}
RUN_ONLY = {"generate", "chat", "compare first", "compare second"}
"""Commands that accept a GGUF file."""


class Given(NamedTuple):
    """A folder to write in, a sound model, and what `fettle train` made of it."""

    here: Path
    model: Path
    run: Path


Fault = Callable[[Given], tuple[object, str]]
"""Makes something faulty; returns its name, and the sentence that the user reads."""


def a_folder_that_is_missing(given: Given) -> tuple[object, str]:
    gone = given.here / "gone"
    return gone, f"no such folder: {gone}; a hub model is written owner/name."


def a_hub_name_offline(given: Given) -> tuple[object, str]:
    return "owner/absent", (
        "owner/absent is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or give "
        "the path of a folder with the model."
    )


def no_name(given: Given) -> tuple[object, str]:
    return "", "the model's name is empty: give a folder or a hub name (owner/name)."


def a_file(given: Given) -> tuple[object, str]:
    file = given.model / "config.json"
    return file, f"{file} is a file, not a model: give the folder with config.json, tokenizer and weights."


def a_gguf_file_that_is_missing(given: Given) -> tuple[object, str]:
    file = given.here / "gone.gguf"
    return file, f"{file} cannot be read (No such file or directory); give the path of a GGUF file."


def a_folder_without_config(given: Given) -> tuple[object, str]:
    return given.here, f"{given.here} is not a model folder: it has no config.json."


def an_unfinished_run(given: Given) -> tuple[object, str]:
    (given.here / "run.yaml").write_text("# Repeat this run: fettle train --config run.yaml\n")
    finish = f"fettle train --resume --output {given.here}"
    return given.here, f"{given.here} is an unfinished run, not a model: finish it with {finish}"


def an_unknown_family(given: Given) -> tuple[object, str]:
    (given.here / "config.json").write_text('{"model_type": "gpt2"}')
    shutil.copy(given.model / "model.safetensors", given.here)
    return given.here, (
        f"{given.here}/config.json: model_type 'gpt2' is not supported; expected one of phi3, llama, mistral, qwen2, "
        "qwen3, gemma, gemma2."
    )


def an_adapter_whose_base_is_missing(given: Given) -> tuple[object, str]:
    return adapter_of(given, *a_folder_that_is_missing(given))


def an_adapter_whose_base_is_on_the_hub_offline(given: Given) -> tuple[object, str]:
    return adapter_of(given, *a_hub_name_offline(given))


def an_adapter_of_an_adapter(given: Given) -> tuple[object, str]:
    return adapter_of(given, given.run, "it is an adapter itself; expected a model with all its weights.")


def an_adapter_of_a_gguf_file(given: Given) -> tuple[object, str]:
    (given.here / "m.gguf").write_bytes(b"GGUF")
    why = "it is a GGUF file; expected a model with all its weights."
    return adapter_of(given, given.here / "m.gguf", why)


def adapter_of(given: Given, base: object, why: str) -> tuple[Path, str]:
    """An adapter with a base that it cannot have, and the sentence with the reason."""
    folder = shutil.copytree(given.run, given.here / "adapter")
    name_base(folder, base)
    return folder, (
        f"{folder} is an adapter for '{base}', which cannot be opened: {why} If the model has moved, correct "
        f"base_model_name_or_path in {folder}/adapter_config.json."
    )


def an_adapter_without_weights(given: Given) -> tuple[object, str]:
    folder = shutil.copytree(given.run, given.here / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    return folder, f"{folder} has no weights: adapter_model.safetensors is missing."


def an_adapter_of_a_base_with_another_shape(given: Given) -> tuple[object, str]:
    folder, config = given.here / "adapter", AutoModelForCausalLM.from_pretrained(given.model).config
    config.intermediate_size = 96
    lora = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_config(config), lora).save_pretrained(folder)
    name_base(folder, given.model)
    return folder, (
        f"{folder}: the adapter belongs to another model: it expects 96 inputs at 'model.layers.0.mlp.down_proj', but "
        "its base has 64."
    )


def one_that_fettle_trained(given: Given) -> tuple[object, str]:
    """The shapes say more than the fingerprint, which differs too."""
    folder, sentence = an_adapter_of_a_base_with_another_shape(given)
    write_facts(Path(str(folder)), AdapterFacts(base_fingerprint="another"))
    return folder, sentence


def name_base(adapter: Path, base: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


FAULTS = [
    a_folder_that_is_missing,
    a_hub_name_offline,
    no_name,
    a_file,
    a_gguf_file_that_is_missing,
    a_folder_without_config,
    an_unfinished_run,
    an_unknown_family,
    an_adapter_whose_base_is_missing,
    an_adapter_whose_base_is_on_the_hub_offline,
    an_adapter_of_an_adapter,
    an_adapter_of_a_gguf_file,
    an_adapter_without_weights,
    an_adapter_of_a_base_with_another_shape,
    one_that_fettle_trained,
]


@pytest.fixture
def answer(
    cli, small_model, trained, chats, tmp_path, monkeypatch
) -> Callable[[str, Fault], tuple[str, str]]:
    """Run a command on something faulty; return what it says and what was expected."""
    monkeypatch.setattr("fettle.export.job.require_hub", lambda name: None)  # nobody is logged in here

    def run(command: str, fault: Fault) -> tuple[str, str]:
        (here := tmp_path / "here").mkdir()
        model, sentence = fault(Given(here, small_model, trained))
        values = {"model": model, "sound": small_model, "chats": chats, "here": here}
        ended = cli(*(word.format(**values) for word in COMMANDS[command].split()))
        assert ended.code == 2, ended
        assert not list(here.glob("new*"))
        return ended.err, f"fettle: error: {sentence}\n"

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_name_is_answered_alike_by_every_command(answer, fault, command):
    said, expected = answer(command, fault)
    assert said == expected


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in RUN_ONLY])
@pytest.mark.parametrize("name", ["m.gguf", "sha256-0123"])
def test_a_gguf_file_where_weights_are_needed(answer, gguf_pair, command, name):
    def fault(given: Given) -> tuple[object, str]:
        file = shutil.copy(gguf_pair.file, given.here / name)
        return file, (
            f"{file} is a GGUF file, which can only be run (with fettle generate, chat and compare): give the Hugging "
            "Face folder or hub name it was made from."
        )

    said, expected = answer(command, fault)
    assert said == expected


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in PLANS])
def test_an_adapter_on_other_weights(answer, command):
    """A plan reads no weights."""

    def fault(given: Given) -> tuple[object, str]:
        base = shutil.copytree(given.model, given.here / "base")
        weights = load_file(base / "model.safetensors")
        weights["lm_head.weight"] += 0.01
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        folder, _ = adapter_of(given, base, "")
        return folder, (
            f"{folder}: the adapter was trained on different weights from those now in {base}; restore the original "
            f"base model, or correct base_model_name_or_path in {folder}/adapter_config.json."
        )

    said, expected = answer(command, fault)
    assert said == expected
