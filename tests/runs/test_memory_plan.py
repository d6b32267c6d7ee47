"""A run keeps to its plan, survives running out of memory, and stops before a broken update."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fettle.cli.display import Display
from fettle.errors import UserError
from fettle.methods import finetune
from fettle.methods.finetune import train
from fettle.methods.sft import rows_of
from fettle.models import layer
from fettle.recompute import allocator
from fettle.recompute.policies import Policy
from fettle.runs import memory_plan as planning
from fettle.runs.memory_plan import RunPlan, plan
from fettle.runs.options import PlanOptions, TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def run(model, data, output, **options) -> str:
    settings = {"max_steps": 3, "learning_rate": 0.02, "samples": 1, "device": "cpu"} | options
    display = Display(Console(file=io.StringIO(), width=200))
    train(TrainOptions(model=str(model), data=str(data), output=str(output), **settings), report=display)
    return display.out.file.getvalue()


def run_layers_with(monkeypatch, function) -> None:
    """Let `function` run the layers once the plan, which runs one as well, is made."""
    plan_run = finetune.plan_run

    def then_replace(*args):
        run_plan = plan_run(*args)
        monkeypatch.setattr(layer, "run_layer", function)
        return run_plan

    monkeypatch.setattr(finetune, "plan_run", then_replace)


def adapter(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_plan_comes_first_and_is_compared_at_the_end(small_model, chats, tmp_path):
    text = run(small_model, chats, tmp_path / "out")
    assert text.index("peak") < text.index("training")
    assert "peak memory:" in text and "predicted" in text and "measured" in text


def test_running_out_of_memory_changes_nothing_but_the_plan(small_model, chats, tmp_path, monkeypatch):
    """The second step fails once, in its second batch; the same step is made again, with a leaner plan."""
    settings = {"gradient_accumulation_steps": 2, "max_length": 64, "max_steps": 3}
    run(small_model, chats, tmp_path / "smooth", **settings)
    run_layer, calls = layer.run_layer, []

    def fail_once(policy, compute, x):
        calls.append(policy)
        if len(calls) == 2 * (2 + 1) + 2:  # two layers a batch; the last layer of the fourth batch
            raise torch.OutOfMemoryError("out of memory")
        return run_layer(policy, compute, x)

    run_layers_with(monkeypatch, fail_once)
    text = run(small_model, chats, tmp_path / "bumpy", **settings)
    assert text.count("out of memory") == 1
    order = list(Policy)
    assert order.index(calls[-1]) > order.index(calls[0]), "no leaner policy was taken"
    smooth, bumpy = adapter(tmp_path / "smooth"), adapter(tmp_path / "bumpy")
    assert all(torch.equal(smooth[name], bumpy[name]) for name in smooth)


def test_out_of_memory_with_the_leanest_plan_ends_the_run(small_model, chats, tmp_path, monkeypatch):
    def fail(policy, compute, x):
        raise torch.OutOfMemoryError("out of memory")

    run_layers_with(monkeypatch, fail)
    with pytest.raises(UserError, match="leanest plan"):
        run(small_model, chats, tmp_path / "out")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_update(small_model, chats, tmp_path, monkeypatch, value):
    run_layer, calls = layer.run_layer, []

    def break_third_step(policy, compute, x):
        calls.append(policy)
        return run_layer(policy, compute, x) * (value if len(calls) == 6 else 1)

    run_layers_with(monkeypatch, break_third_step)
    with pytest.raises(UserError, match=r"loss is nan at step 3.*chats.jsonl, (row|line) \d+"):
        run(small_model, chats, tmp_path / "out", save_steps=50, max_steps=4)
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in adapter(checkpoint).values())


def test_a_model_that_is_no_numbers_is_blamed_itself(small_model, chats, tmp_path):
    broken = shutil.copytree(small_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'model.norm.weight' contains NaN or Inf"):
        run(broken, chats, tmp_path / "out", samples=0, eval_fraction=0.0)


def test_a_run_that_diverged_keeps_no_ruined_checkpoint(small_model, chats, tmp_path):
    with pytest.raises(UserError, match=r"lower learning_rate, into a new output"):
        run(small_model, chats, tmp_path / "out", learning_rate=9e8, save_steps=1, max_steps=4)
    checkpoints = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    assert all(tensor.isfinite().all() for each in checkpoints for tensor in adapter(each).values())


def test_a_budget_nothing_fits_in(small_model, chats, tmp_path):
    with pytest.raises(UserError, match=r"this run needs at least .* [MG]B"):
        run(small_model, chats, tmp_path / "out", memory="1MB")
    assert not (tmp_path / "out").exists()


def watched(*words) -> tuple[str, int]:
    """What `fettle` prints, and the most memory its process had. A run resets its own mark, so it is polled."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fettle", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    printed = Thread(target=lambda: lines.append(process.stdout.read()))
    lines: list[str] = []
    printed.start()
    while process.poll() is None:
        with suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
        printed.join(0.02)
    printed.join()
    assert process.returncode == 0, lines
    return lines[0], peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_whole_run_stays_within_its_promise(chats, tmp_path):
    """From the first import to the report: the embedded model, with scores and answers before and after."""
    words = ("--model", "fettle-tiny", "--device", "cpu")
    text, peak = watched(
        "train",
        *words,
        "--data",
        chats,
        "--output",
        tmp_path / "out",
        "--max-steps",
        2,
        "--eval-fraction",
        0.2,
    )
    promised = float(re.search(r"^ *peak +([\d.]+) MB", text, re.MULTILINE)[1]) * 1e6
    assert peak < 1.05 * promised and promised < 1.1 * peak


def test_the_process_counts_as_large_as_it_is(small_model, chats, tmp_path, monkeypatch):
    """A budget that a small process fits in is not refused for what a larger one would take."""
    small = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=100_000_000))
    monkeypatch.setattr(planning.psutil, "Process", lambda: small)
    text = run(small_model, chats, tmp_path / "out", memory="250MB", max_steps=1)
    assert re.search(r"program and libraries +140\.0 MB", text)


def test_the_plan_is_put_into_effect_once_and_on_the_adapters(small_model, chats, tmp_path, monkeypatch):
    adapted, apply_to = [], RunPlan.apply_to

    def note(run_plan, model):
        adapted.append(any("lora_" in name for name, _ in model.named_parameters()))
        apply_to(run_plan, model)

    monkeypatch.setattr(RunPlan, "apply_to", note)
    run(small_model, chats, tmp_path / "out", max_steps=1)
    assert adapted == [True]


def test_a_run_leaves_the_heap_as_it_was(small_model, chats, tmp_path):
    allocator.set_heap("default")
    run(small_model, chats, tmp_path / "out", max_steps=1)
    plan(PlanOptions(model=str(small_model), device="cpu"))
    assert allocator._current == "default"


def test_plan_says_that_it_measures_the_device_next_to_its_result(small_model, cli):
    words = ("plan", "--model", small_model, "--device", "cpu", "--json")
    ended = cli(*words, "--remeasure")
    assert json.loads(ended.out) and "measuring the speed of this cpu" in ended.err
    assert "measuring" not in cli(*words).err or "other programs used" in ended.err


@pytest.mark.parametrize("size", ["lots", "16", "0GB", "-3GB", "1e3MB"])
def test_a_malformed_budget(small_model, size, cli):
    ended = cli("plan", "--model", small_model, f"--memory={size}", "--device", "cpu")
    expected = "means 16 bytes; for gigabytes write 16GB" if size == "16" else "such as 16GB"
    assert ended.code == 2 and expected in ended.err


def test_a_plan_needs_no_weights(small_model, tmp_path, cli):
    (tmp_path / "config.json").write_text((small_model / "config.json").read_text())
    ended = cli("plan", "--model", tmp_path, "--memory", "4GB", "--json", "--device", "cpu")
    found = json.loads(ended.out)
    assert ended.code == 0 and found["peak_bytes"] <= found["budget_bytes"] == 4_000_000_000
    assert sum(found["memory_bytes"].values()) == found["peak_bytes"]
    assert sum(found["layers"].values()) == 2
    assert found["longest_context_tokens"] == 256


def test_a_context_beyond_the_models(small_model, cli):
    ended = cli("plan", "--model", small_model, "--context", 257, "--device", "cpu")
    assert ended.code == 2 and "256" in ended.err


@pytest.mark.parametrize("name", ["context", "rank", "batch-size", "gradient-accumulation-steps"])
def test_nothing_cannot_be_planned(small_model, name, cli):
    ended = cli("plan", "--model", small_model, f"--{name}", 0, "--device", "cpu")
    assert ended.code == 2 and f"--{name} is 0; expected 1 or more" in ended.err


def test_rows_are_found_by_their_tokens():
    from datasets import Dataset

    packs = Dataset.from_dict({"input_ids": [[1, 2, 3], [1, 4], [4, 5]], "rows": [["a", "b"], ["c"], ["d"]]})
    assert rows_of(packs, [1, 2, 3, 4, 5]) == ["a", "b", "d"]
    assert rows_of(packs, [9, 9]) == []
