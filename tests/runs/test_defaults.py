"""The choices a newcomer need not make."""

import pytest

from fettle.errors import UserError
from fettle.runs.defaults import (
    DEFAULT_MAX_LENGTH,
    MAX_STEPS_PER_EPOCH,
    MIN_STEPS_PER_EPOCH,
    complete,
    learning_rate,
    length_limit,
    pack_length,
    require_valid,
)
from fettle.runs.method_facts import METHOD_FACTS
from fettle.runs.options import PretrainOptions, TrainOptions


def options(**values: object) -> TrainOptions:
    return TrainOptions(model="m", data="d", output="o", **values)


def completed(
    packs: int = 100, parameters: int = 10**9, weight_bytes: int = 0, **values: object
) -> TrainOptions:
    return complete(
        options(**values),
        packs=packs,
        parameters=parameters,
        weight_bytes=weight_bytes,
        facts=METHOD_FACTS["sft"],
    )


def test_everything_the_loop_needs_is_chosen():
    chosen = completed()
    assert None not in (
        *(chosen.batch_size, chosen.gradient_accumulation_steps, chosen.epochs, chosen.max_steps),
        *(chosen.learning_rate, chosen.eval_steps, chosen.save_steps),
    )


def test_three_passes_over_the_packs():
    chosen = completed(packs=100)
    assert (chosen.batch_size, chosen.max_steps) == (1, 300)
    assert completed(packs=100, epochs=0.5).max_steps == 50
    assert completed(packs=100, batch_size=8).max_steps == 39  # 12 full steps and a rest, three times
    assert completed(packs=100, batch_size=4, gradient_accumulation_steps=5, epochs=1.0).max_steps == 5
    assert completed(packs=1, epochs=0.1).max_steps == 1


def test_what_was_asked_for_is_kept():
    asked = {
        "max_steps": 7,
        "batch_size": 3,
        "learning_rate": 1e-5,
        "gradient_checkpointing": False,
        "eval_steps": 2,
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
        "epochs": 9.0,
    }
    chosen = completed(weight_bytes=10**11, **asked)
    assert {name: getattr(chosen, name) for name in asked} == asked


def test_completing_twice_changes_nothing():
    """So that a run repeated from its run.yaml is the same run."""
    chosen = completed(packs=5000, parameters=10**6)
    assert complete(chosen, packs=5000, parameters=10**6, weight_bytes=0, facts=METHOD_FACTS["sft"]) == chosen


def test_large_data_gets_more_packs_a_step():
    chosen = completed(packs=100_000, epochs=1.0)
    assert chosen.max_steps <= MAX_STEPS_PER_EPOCH * 1.01
    assert chosen.batch_size == 1  # rows side by side would need the memory of all of them
    assert chosen.gradient_accumulation_steps * MAX_STEPS_PER_EPOCH >= 99_000


def test_only_large_new_models_redo_activations():
    """Where adapters are trained the memory plan decides."""
    assert completed(weight_bytes=7 * 10**9).gradient_checkpointing is None
    for weight_bytes, is_on in ((7 * 10**6, False), (7 * 10**9, True)):
        chosen = complete(
            options(),
            packs=1,
            parameters=1,
            weight_bytes=weight_bytes,
            is_full=True,
            facts=METHOD_FACTS["sft"],
        )
        assert chosen.gradient_checkpointing is is_on


def test_smaller_models_take_larger_steps():
    rates = [learning_rate(size) for size in (10**6, 10**8, 10**9, 4 * 10**9, 10**11)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 2e-4
    assert all(learning_rate(size, is_full=True) < learning_rate(size) for size in (10**6, 10**9, 10**11))


def test_small_data_is_packed_short_enough_to_make_steps():
    lengths = [20] * 320
    assert pack_length(lengths, 2048) == 20 * 320 // MIN_STEPS_PER_EPOCH
    assert pack_length([*lengths, 700], 2048) == 700  # never below a row
    assert pack_length([500] * 1000, 2048) == 2048  # never above the limit


def test_the_longest_row():
    assert length_limit(options(), 131_072) == DEFAULT_MAX_LENGTH
    assert length_limit(options(), 1024) == 1024
    assert length_limit(options(max_length=131_072), 131_072) == 131_072
    with pytest.raises(UserError, match=r"^max_length is 1025.* 1024 tokens"):
        length_limit(options(max_length=1025), 1024)


def test_sensible_options_pass():
    require_valid(options())
    require_valid(options(seed=2**32 - 1, samples=0, eval_fraction=0.0, dropout=0.0, warmup_ratio=0.0))
    require_valid(PretrainOptions(data="d", output="o"))


@pytest.mark.parametrize(
    "values",
    [
        *(
            {name: 0}
            for name in (
                "rank",
                "max_steps",
                "batch_size",
                "save_steps",
                "eval_steps",
                "max_length",
                "early_stopping",
            )
        ),
        *({name: 0.0} for name in ("epochs", "learning_rate", "max_grad_norm", "alpha")),
        *({name: float("nan")} for name in ("epochs", "learning_rate", "dropout", "eval_fraction", "alpha")),
        *({name: 1.0} for name in ("dropout", "eval_fraction", "warmup_ratio")),
        *({name: -1} for name in ("seed", "samples", "weight_decay")),
        {"seed": 2**32},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_named(values):
    (name,) = values
    with pytest.raises(UserError, match=f"^{name} is "):
        require_valid(options(**values))


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "layers", "heads", "key_value_heads", "context"]
)
def test_a_size_that_cannot_be_meant_is_named(name):
    with pytest.raises(UserError, match=f"^{name} is 0"):
        require_valid(PretrainOptions(data="d", output="o", **{name: 0}))


@pytest.mark.parametrize("package", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(package, monkeypatch):
    monkeypatch.setattr("fettle.runs.defaults.find_spec", lambda name: None)
    refused = rf"^report_to {package} needs the package {package}, .*pip install {package}\.$"
    with pytest.raises(UserError, match=refused):
        require_valid(options(report_to=package))


@pytest.mark.parametrize("name", ["data", "eval_data", "keep_data", "output"])
def test_an_empty_name_is_refused(name: str) -> None:
    """As `--data "$UNSET"` gives it: the current folder would be taken."""
    named = {"model": "m", "data": "d", "output": "o"} | {name: ""}
    with pytest.raises(UserError, match=f"^{name} is empty"):
        require_valid(TrainOptions(**named))
