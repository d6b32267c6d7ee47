"""The held-out loss decides when a run stops and which weights are its result, also after a resume."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fettle.errors import UserError
from fettle.events import Message
from fettle.methods.finetune import resume_training, train
from fettle.runs.options import TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

BEST = 4  # the step with the lowest held-out loss: 4.65 there, 5.01 to 5.39 after it


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Held-out rows whose answers the training rows soon make less likely."""
    file = tmp_path_factory.mktemp("unlike") / "unlike.jsonl"
    rows = [{"prompt": f"Say {n}.", "completion": "It is Paris."} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def options(small_model, chats, unlike, tmp_path_factory):
    return TrainOptions(
        model=str(small_model), data=str(chats), eval_data=str(unlike), device="cpu",
        output=str(tmp_path_factory.mktemp("best") / "whole"), keep_best=True, samples=1, max_steps=12, eval_steps=2,
        save_steps=5, learning_rate=0.1, schedule="constant",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(options):
    events = []
    return train(options, report=events.append), events


@pytest.fixture(scope="module")
def best(options):
    """The adapter of a run that ends after its best step, also with one step of warmup."""
    output = options.output + "-short"
    train(dataclasses.replace(options, output=output, max_steps=BEST, warmup_ratio=0.25, keep_best=False))
    return adapter_of(output)


def adapter_of(output: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(output) / "adapter_model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_result_is_the_best_evaluations(whole, best):
    outcome, events = whole
    curve = dict(outcome.report.eval_curve)
    assert min(curve, key=curve.get) == BEST and max(curve) == 12
    assert_equal(adapter_of(outcome.output), best)
    assert outcome.after.held_out["loss"] == pytest.approx(curve[BEST], rel=0.05)
    remark = f"step {BEST} of 12, with the lowest held-out loss of all checkpoints ({curve[BEST]:.4g})"
    assert Message(f"result: {remark}") in events
    assert remark in (outcome.output / "report.html").read_text()


def test_a_resumed_run_keeps_the_best_too(options, best, killed_at_save, tmp_path):
    with killed_at_save(BEST):
        train(dataclasses.replace(options, output=str(tmp_path / "run")))
    output = (tmp_path / "run").rename(tmp_path / "moved")
    for step in (10, 12):
        with killed_at_save(step):
            resume_training(output)
    resume_training(output)
    assert_equal(adapter_of(output), best)


def test_it_stops_when_the_loss_does_not_fall(options, best, tmp_path):
    """At step 8: the evaluations after 6 and 8 steps are not below that after 4."""
    changes = {"early_stopping": 2, "keep_best": False, "output": str(tmp_path / "run")}
    outcome = train(dataclasses.replace(options, **changes))
    assert [step for step, _ in outcome.report.eval_curve] == [0, 2, 4, 6, 8]
    assert outcome.report.method.endswith("; stopped early, after step 8")
    assert_equal(adapter_of(outcome.output), best)


@pytest.mark.parametrize("steps", [(4, 5), (5, 8)], ids=str)
def test_a_resumed_run_stops_at_the_same_step(options, best, killed_at_save, tmp_path, steps):
    """Also one that was killed after it had stopped, at step 8, before its result was saved."""
    first, second = steps
    with killed_at_save(first):
        train(dataclasses.replace(options, early_stopping=2, output=str(tmp_path / "run")))
    with killed_at_save(second):
        resume_training(tmp_path / "run")
    outcome = resume_training(tmp_path / "run")
    assert [step for step, _ in outcome.report.eval_curve] == [0, 2, 4, 6, 8]
    assert_equal(adapter_of(outcome.output), best)


@pytest.mark.parametrize("option", [{"keep_best": True}, {"early_stopping": 3}], ids=str)
def test_it_needs_held_out_rows(options, tmp_path, option):
    (name,) = option
    changes = {"output": str(tmp_path / "none"), "eval_data": None, "keep_best": False, **option}
    refused = rf"^{name} needs held-out rows, and there are none; give eval_data, or leave it out\.$"
    with pytest.raises(UserError, match=refused):
        train(dataclasses.replace(options, **changes, eval_fraction=0.0))
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "Say 1.", "completion": "1"}\n')
    with pytest.raises(UserError, match=refused):
        train(dataclasses.replace(options, **changes | {"data": str(few)}))
    assert not (tmp_path / "none").exists()
