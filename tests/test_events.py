"""A job's events: plain data that any face can show, and no output of the job's own."""

import dataclasses
import json
import pickle

import pytest
import transformers

import fettle
from fettle import events
from fettle.methods.finetune import train
from fettle.runs.options import TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture
def options(small_model, chats, tmp_path) -> TrainOptions:
    return TrainOptions(
        model=str(small_model),
        data=str(chats),
        output=str(tmp_path / "out"),
        max_steps=2,
        samples=2,
        device="cpu",
    )


@pytest.fixture
def quiet_transformers():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.usefixtures("quiet_transformers")
def test_a_run_reports_to_a_list_and_prints_nothing(options, capfd):
    reported: list[events.Event] = []
    train(options, report=reported.append)
    assert capfd.readouterr() == ("", "")

    kinds = [type(event).__name__ for event in reported]
    order = ["DataSummary", "Planned", "Progress", "Sample", "Training", "Progress"]
    found = iter(kinds)
    assert all(kind in found for kind in order), kinds  # in this order, with others between them
    assert [json.loads(json.dumps(dataclasses.asdict(event))) for event in reported]

    plan = next(event for event in reported if isinstance(event, events.Planned))
    assert sum(plan.figures["memory_bytes"].values()) == plan.figures["peak_bytes"]
    last = [event for event in reported if isinstance(event, events.Training)][-1]
    assert (last.step, last.steps, last.is_over) == (2, 2, True)
    assert last.loss is not None and last.tokens_per_second and last.peak_memory_bytes > 10**7


def test_the_public_function_shows_them_in_the_terminal_by_default(options, capfd):
    fettle.train(options)
    out = capfd.readouterr().out
    assert out.startswith("data\n") and "peak memory: " in out and "step 2/2" in out


def test_a_public_job_can_be_sent_to_another_process():
    assert fettle.train is fettle.train
    assert pickle.loads(pickle.dumps(fettle.train)) is fettle.train
