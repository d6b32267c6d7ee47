"""A dry run takes real steps, on the largest batch, and leaves nothing behind."""

import json
import re
import tempfile

import pytest

from fettle.events import Message
from fettle.methods import finetune
from fettle.methods.finetune import dry_run
from fettle.runs.method_facts import METHOD_FACTS
from fettle.runs.options import TrainOptions
from fettle.runs.recovery import Recovery

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

ROWS = 12
LONGEST = 7  # the row with the longest answer


def row(method: str, n: int) -> dict[str, object]:
    answer = f"Here is {n}!" * (4 if n == LONGEST else 1)
    if method == "kto":
        return {"prompt": f"Say {n}.", "completion": answer, "label": n % 2 == 0}
    if METHOD_FACTS[method].answers == 2:
        return {"prompt": f"Say {n}.", "chosen": answer, "rejected": "It is Paris."}
    return {"prompt": f"Say {n}.", "completion": answer}


@pytest.mark.parametrize("method", METHOD_FACTS)
def test_it_steps_on_the_longest_row(method, small_model, tmp_path, monkeypatch):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row(method, n)) + "\n" for n in range(ROWS)))
    seen, events, step = [], [], Recovery.training_step

    def watched(trainer, model, inputs, *args):
        seen.append(trainer.rows_of(inputs))
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(Recovery, "training_step", watched)
    options = TrainOptions(
        model=str(small_model), data=str(data), method=method, output=str(tmp_path / "out"), device="cpu",
        batch_size=2 if method == "kto" else 1, gradient_accumulation_steps=2, eval_fraction=0.0, max_steps=50,
        **({"packing": False} if method == "sft" else {}),
    )  # fmt: skip
    found = dry_run(options, report=events.append)
    assert len(seen) == 3 and all(f"rows.jsonl, line {LONGEST + 1}" in rows for rows in seen)
    assert found.loss > 0 and found.seconds > 0 and found.peak_memory_bytes > 100e6
    assert sorted(tmp_path.iterdir()) == [data]
    assert Message("nothing was written") in events


def test_its_batch_is_one_that_the_run_has_and_that_is_planned_for(small_model, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    pairs = [row("dpo", n) | {"chosen": "Paris! " * (30 if n < 2 else 1)} for n in range(8)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    plans, events = [], []
    planned = finetune.plan_run
    monkeypatch.setattr(finetune, "plan_run", lambda *args: plans.append(planned(*args)) or plans[-1])
    options = TrainOptions(
        model=str(small_model), data=str(data), method="dpo", output=str(tmp_path / "out"), device="cpu",
        batch_size=2, eval_fraction=0.0,
    )  # fmt: skip
    dry_run(options, report=events.append)
    tokens = next(
        event.text for event in events if isinstance(event, Message) and "largest batch" in event.text
    )
    assert f"{plans[0].work.tokens:,} tokens each" in tokens  # the two longest rows are never in one batch


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_it_leaves_nothing_behind(cli, command, small_model, chats, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = ("--model", small_model) if command == "train" else ("--hidden-size", 32, "--layers", 1)
    words = (*model, "--data", chats, "--output", tmp_path / "out", "--device", "cpu", "--max-steps", 40)
    ended = cli(command, *words, "--dry-run")
    assert ended.code == 0, ended.err
    predicted = r"[\d.]+ .?B predicted, " if command == "train" else ""
    assert re.search(rf"^peak memory in training: {predicted}[\d.]+ .?B measured$", ended.out, re.M)
    assert re.search(r"^time per full step: .* measured; 40 such steps take [\d.]+ s$", ended.out, re.M)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_resumed_is_not_tried(cli, tmp_path):
    ended = cli("train", "--resume", "--dry-run", "--output", tmp_path)
    assert ended.code == 2 and "--resume accepts only --output" in ended.err
