"""A run that was killed goes on and ends in the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fettle.errors import UserError
from fettle.events import Message
from fettle.files import sha256_of
from fettle.methods.finetune import resume_training, train
from fettle.methods.pretrain import new_model
from fettle.models.save import save_model
from fettle.options import write
from fettle.runs import resume
from fettle.runs.options import PretrainOptions, TrainOptions
from fettle.tiny.lessons import lessons
from fettle.tiny.tokenizer import train_tokenizer

STEPS = 24


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A small checkpoint and its rows, on disk."""
    import json

    import torch

    folder = tmp_path_factory.mktemp("material")
    rows = list(lessons(150, seed=3, split="train"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row["messages"]], 350)
    torch.manual_seed(0)
    sizes = PretrainOptions(
        data="", output="", hidden_size=32, intermediate_size=64, layers=2, heads=2, context=256
    )
    save_model(new_model(sizes, tokenizer), tokenizer, folder / "model")
    return folder


def command(material: Path, output: Path) -> list[str]:
    """The words after `fettle` that start the run."""
    options = {
        "--model": material / "model",
        "--data": material / "rows.jsonl",
        "--output": output,
        "--max-steps": STEPS,
        "--save-steps": 3,
        "--eval-steps": 5,
        "--samples": 2,
        "--dropout": 0.1,  # random numbers in every step: their state must survive too
        "--gradient-accumulation-steps": 2,
        "--device": "cpu",
    }
    return ["train", *(str(word) for pair in options.items() for word in pair)]


def resumed(cli, output: Path):
    ended = cli("train", "--resume", "--output", output)
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def uninterrupted(material, cli):
    output = material / "whole"
    ended = cli(*command(material, output))
    assert ended.code == 0, ended.err
    return output


def weights(output: Path) -> str:
    return sha256_of([output / "adapter_model.safetensors"])


def ended_by(number: signal.Signals, words: list[str], condition, seconds: float = 300.0) -> tuple[int, str]:
    """Start `fettle`, send it a signal once the condition holds; return its exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fettle", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.005)
    process.send_signal(number)
    errors = process.communicate()[1]
    return process.returncode, errors


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_killed_at_a_random_point_it_ends_in_the_same_bits(cli, material, uninterrupted, seed):
    output = material / f"killed-{seed}"
    at = random.Random(seed).choice(range(0, STEPS - 3, 3))
    checkpoints = output / resume.CHECKPOINTS
    # the folder appears before it is complete, so the kill may fall into the writing of a checkpoint
    folder = checkpoints / f"checkpoint-{at}" if at else checkpoints
    ended_by(signal.SIGKILL, command(material, output), folder.exists)
    assert not (output / "adapter_config.json").exists()

    resumed(cli, output)
    assert weights(output) == weights(uninterrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(cli, material, uninterrupted):
    output = material / "interrupted"
    first = output / resume.CHECKPOINTS / "checkpoint-3"
    code, errors = ended_by(signal.SIGINT, command(material, output), first.exists)
    assert code == 130
    assert f"fettle train --resume --output {output}" in errors
    assert "Traceback" not in errors

    resumed(cli, output)
    assert weights(output) == weights(uninterrupted)
    assert "has already finished" in resumed(cli, output).out


def test_killed_after_its_last_step_it_makes_no_further_one(cli, material):
    output = material / "late"
    words = [*command(material, output), "--schedule", "constant"]  # a further step would move the weights
    assert cli(*words).code == 0
    before = weights(output)
    points = (output / "report.html").read_text().count("<circle")
    for name in (
        "report.html",
        "adapter_config.json",
    ):  # as a kill between the last step and the end leaves it
        (output / name).unlink()
    resumed(cli, output)
    assert weights(output) == before
    assert (output / "report.html").read_text().count("<circle") == points


def test_an_incomplete_checkpoint_is_never_used(tmp_path):
    for step, is_complete in ((5, True), (10, True), (15, False)):
        folder = tmp_path / resume.CHECKPOINTS / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(os.urandom(8))
        if is_complete:
            resume.mark_complete(folder)
    (tmp_path / resume.CHECKPOINTS / "checkpoint-99").touch()
    assert resume.last_complete(tmp_path) == tmp_path / resume.CHECKPOINTS / "checkpoint-10"
    assert not (tmp_path / resume.CHECKPOINTS / "checkpoint-15").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "added"])
def test_a_damaged_checkpoint_is_never_used(tmp_path, damage):
    for step in (5, 10):
        folder = tmp_path / resume.CHECKPOINTS / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(b"12345678")
        (folder / "scheduler.pt").write_bytes(b"1")
        resume.mark_complete(folder)
    file = folder / "optimizer.pt"
    if damage == "gone":
        (folder / "scheduler.pt").unlink()
    elif damage == "added":
        (folder / "rng_state.pth").touch()
    else:
        file.write_bytes(b"1234" if damage == "cut" else b"12345679")
    assert resume.last_complete(tmp_path).name == "checkpoint-5"


def test_an_option_that_changed_since_the_run_began_is_refused(tmp_path):
    options = TrainOptions(model="m", data="d", output=str(tmp_path))
    write(options, tmp_path / resume.RUN_FILE)
    resume.write_facts(tmp_path, {"options": resume.deciding_options(options)})
    assert resume.options_to_resume(tmp_path, TrainOptions) == options
    for changes in ({"rank": 8}, {"learning_rate": 1e-3}):
        write(replace(options, **changes), tmp_path / resume.RUN_FILE)
        with pytest.raises(UserError, match=rf"run\.yaml: {next(iter(changes))} is .*, and was "):
            resume.options_to_resume(tmp_path, TrainOptions)
    moved = replace(options, model="elsewhere/m", data="elsewhere/d", memory="8GB")
    write(moved, tmp_path / resume.RUN_FILE)
    assert resume.options_to_resume(tmp_path, TrainOptions) == moved


@pytest.mark.parametrize("name", ["train", "pretrain"])
def test_a_new_run_is_not_started_over_one_that_has_not_ended(cli, tmp_path, name):
    output = tmp_path / "my run"
    output.mkdir()
    (output / resume.RUN_FILE).write_text(f"# Repeat this run: fettle {name} --config run.yaml\n")
    model = ["--model", "x"] if name == "train" else []
    ended = cli(name, *model, "--data", "x", "--output", output)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].strip() == f"fettle {name} --resume --output '{output}'"


def test_a_run_killed_before_its_run_file_was_written_is_started_again(cli, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".partial-999999999-run.yaml").touch()
    ended = cli("train", "--resume", "--output", tmp_path)
    assert ended.code == 2 and "contains no run to resume (found nothing" in ended.err
    assert "give the --output of an interrupted run, or start a new one" in ended.err
    assert resume.new_output(str(tmp_path)) == str(tmp_path)


def test_checkpoints_without_the_facts_of_their_run_are_refused(tmp_path):
    assert resume.read_facts(tmp_path) == {}
    (tmp_path / resume.CHECKPOINTS / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"facts\.json is missing"):
        resume.read_facts(tmp_path)


def test_the_lock_of_a_run_killed_after_its_report_goes(tmp_path):
    for name in (resume.RUN_FILE, resume.REPORT, ".lock"):
        (tmp_path / name).touch()
    assert resume.options_to_resume(tmp_path, TrainOptions) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [resume.REPORT, resume.RUN_FILE]


def test_without_a_checkpoint_a_resumed_run_starts_at_its_first_step(small_model, chats, tmp_path):
    options = TrainOptions(
        model=str(small_model),
        data=str(chats),
        output=str(tmp_path / "run"),
        max_steps=2,
        samples=1,
        device="cpu",
    )
    train(options)
    before = weights(tmp_path / "run")
    for name in (resume.REPORT, "adapter_config.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / resume.CHECKPOINTS)
    reported = []
    resume_training(tmp_path / "run", report=reported.append)
    assert Message("no complete checkpoint found: training starts from step 1") in reported
    assert weights(tmp_path / "run") == before


def test_a_home_folder_is_meant_in_a_run_file_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resume.new_output("~/run") == str(tmp_path / "run")
