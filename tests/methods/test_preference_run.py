"""`fettle train` with rows of compared answers, from a file to an adapter that prefers the better ones."""

import json
from pathlib import Path
from random import Random

import pytest

from fettle.data import PreferenceExample
from fettle.engine.load import load
from fettle.errors import UserError
from fettle.events import Message
from fettle.methods.finetune import train
from fettle.methods.preference import pair_rows
from fettle.runs.options import TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

COLORS = ("red", "blue", "green", "black")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loud answers are preferred to quiet ones."""
    file, random = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", Random(0)
    with file.open("w") as out:
        for n in range(80):
            color, thing = random.choice(COLORS), random.choice(("hat", "cat", "door", "lamp"))
            quiet = f"a {color} {thing}"
            row = {"prompt": f"Name thing {n}: {quiet}", "chosen": quiet.upper(), "rejected": quiet}
            out.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def labelled(pairs: Path) -> Path:
    file = pairs.with_name("labelled.jsonl")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    both = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in both))
    return file


def run(method: str, data: Path, output: Path, **others: object) -> tuple:
    said: list[str] = []
    options = TrainOptions(
        model="fettle-tiny", data=str(data), output=str(output), method=method, device="cpu", samples=2,
        **{"max_steps": 30, "batch_size": 4, "learning_rate": 1e-3} | others,
    )  # type: ignore[arg-type]  # fmt: skip
    outcome = train(
        options, report=lambda event: said.append(event.text) if isinstance(event, Message) else None
    )
    return outcome, said


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo"])
def test_pairs_teach_which_answer_is_preferred(method: str, pairs: Path, tmp_path: Path) -> None:
    outcome, said = run(method, pairs, tmp_path / "out")
    before, after = outcome.before.held_out, outcome.after.held_out
    assert before["preferred"] < 0.3 and after["preferred"] > 0.9
    assert after["loss"] < before["loss"]
    assert (outcome.output / "adapter_model.safetensors").exists()
    assert not (outcome.output / "ref").exists()  # TRL's copy of the adapter
    assert {score.name for score in outcome.report.scores} == {
        "held-out loss", "held-out pairs, chosen answer preferred",
    }  # fmt: skip
    assert any(text.startswith("peak memory") for text in said)
    model, _ = load(outcome.output, device="cpu")
    assert list(model.peft_config) == ["default"]


def test_dpo_starts_at_the_reference(pairs: Path, tmp_path: Path) -> None:
    outcome, _ = run("dpo", pairs, tmp_path / "out", max_steps=1)
    assert outcome.before.held_out["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2, of equal rewards


def test_labelled_answers_teach_which_are_good(labelled: Path, tmp_path: Path) -> None:
    outcome, _ = run("kto", labelled, tmp_path / "out", max_steps=40)
    assert outcome.before.held_out["told_apart"] == 0.5  # no rewards yet
    assert outcome.after.held_out["told_apart"] > 0.9
    assert outcome.after.held_out["loss"] < outcome.before.held_out["loss"]


def test_pairs_are_labelled_answers_for_kto(pairs: Path, tmp_path: Path) -> None:
    outcome, _ = run("kto", pairs, tmp_path / "out", max_steps=1)
    assert outcome.after.held_out["told_apart"] is not None


def test_rows_without_a_second_answer_name_the_method_that_takes_them(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: has no `chosen` and `rejected`.*kto"):
        run("dpo", labelled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_held_out_pairs_that_are_all_too_long_are_an_error(pairs: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "long.jsonl"
    held_out.write_text(json.dumps({"prompt": "word " * 200, "chosen": "Yes.", "rejected": "No."}) + "\n")
    with pytest.raises(UserError, match=r"eval_data.*Nothing is left"):
        run("dpo", pairs, tmp_path / "out", eval_data=str(held_out), max_length=64)


def test_a_loss_may_be_given_as_one_text(pairs: Path, tmp_path: Path) -> None:
    outcome, _ = run("dpo", pairs, tmp_path / "out", loss="ipo", max_steps=1)
    assert outcome.before.held_out["loss"] == pytest.approx(25.0)  # (1 / (2 * 0.1)) ^ 2, of equal rewards


def test_with_dropout_the_plan_counts_every_prompt_twice() -> None:
    pair = PreferenceExample([1, 2, 3], [4], [5, 6], "", [4], [5, 6])
    assert pair_rows(has_dropout=False).lengths(pair) == [4, 2]
    assert pair_rows(has_dropout=True).lengths(pair) == [4, 5]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sft", {"beta": 0.1}, "beta.* belongs to .*dpo or kto or orpo or simpo"),
        ("simpo", {"loss": ["ipo"]}, "loss.* belongs to .*dpo or kto"),
        ("dpo", {"loss": ["nonsense"]}, "'nonsense' is not a loss of .*expected sigmoid"),
        ("dpo", {"loss": ["ipo", "ipo=2"]}, "ipo is given twice"),
        ("dpo", {"loss": ["ipo=much"]}, "'ipo=much' has no weight above 0"),
        ("dpo", {"loss": ["exo_pair"]}, "exo_pair needs .*label_smoothing"),
        (
            "dpo",
            {"label_smoothing": 0.5},
            "label_smoothing.* is 0.5; expected a fraction from 0 to below 0.5",
        ),
        ("dpo", {"beta": 0.0}, "beta.* is 0.0; expected a number above 0"),
        ("dpo", {"train_on": "all"}, "train_on.* belongs to .*sft"),
        ("dpo", {"packing": False}, "packing.* belongs to .*sft"),
        ("kto", {"batch_size": 1}, "batch_size.* is 1, but the loss kto needs an answer to another prompt"),
        ("dpo", {"loss": [1.0]}, "1.0 is not the name of a loss"),
        ("ppo", {}, "method.* is 'ppo'; expected sft, dpo"),
        ("kto", {"loss": ["kto", "apo_zero_unpaired"]}, "kto takes one loss"),
        ("simpo", {"margin": -1.0}, "margin.* is -1.0; expected 0 or more"),
        ("orpo", {"margin": 1.0}, "margin.* belongs to .*simpo"),
    ],
)
def test_options_of_another_method_and_values_out_of_range_are_refused(
    method: str, options: dict, message: str, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(method, pairs, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
