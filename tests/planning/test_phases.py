"""A run's peak is that of the phase that needs most, and answers are batched so that they do not become it."""

import dataclasses

import pytest
from transformers import Gemma2Config, LlamaConfig

from fettle.planning.costs import Workload
from fettle.planning.gpu_probe import Line, PairSeconds, Rates
from fettle.planning.phases import answers_bytes, loading_bytes, most_answers, other_phases
from fettle.planning.plan import Planner, least_peak
from fettle.planning.report import rows
from fettle.planning.shapes import Shapes
from fettle.recompute.policies import Policy

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
SHAPES = Shapes.of(LlamaConfig(**SIZES))
WORK = Workload(tokens=512, evaluated_tokens=512, answered_tokens=100, stored_item=2)
RATES = Rates(
    layers={policy: Line(1e-3, 1e-6) for policy in Policy},
    attention={512: PairSeconds(1e-9, 1e-9)},
    head=1e-6,
    products=1e12,
    update=1e-9,
)


def test_answers_stay_within_the_peak_of_training() -> None:
    plan = Planner(SHAPES, RATES).plan(WORK, (Policy.KEEP,) * 4)
    count = most_answers(SHAPES, WORK, plan.base, plan.peak)
    held = plan.base + plan.weights + plan.adapters
    assert count > 1 and held + answers_bytes(SHAPES, WORK, count) <= plan.peak


def test_one_question_is_answered_whatever_it_takes_and_counts() -> None:
    long = dataclasses.replace(WORK, answered_tokens=100_000)
    plan = Planner(SHAPES, RATES).plan(long, (Policy.KEEP,) * 4)
    assert most_answers(SHAPES, long, plan.base, plan.peak) == 1
    assert plan.phase == "answers" and plan.beyond_training > 0
    assert plan.peak == least_peak(SHAPES, long, (Policy.KEEP,), 0)


@pytest.mark.parametrize("reached", [0, 10**9])
def test_the_rows_of_a_plan_add_up_to_its_peak(reached: int) -> None:
    plan = Planner(SHAPES, RATES, base=10**6, reached=reached).plan(WORK, (Policy.RECOMPUTE,) * 4)
    assert sum(size for _, size in rows(plan)) == plan.peak
    assert plan.peak == reached if reached else plan.phase == "training"


def test_weights_of_another_type_are_held_twice_while_they_load() -> None:
    """The file that they are read from is mapped, and its pages count."""
    same, changed = (dataclasses.replace(WORK, stored_item=n) for n in (2, 4))
    assert loading_bytes(SHAPES, changed) - loading_bytes(SHAPES, same) == 4 * SHAPES.parameters


def test_written_out_attention_counts_its_scores() -> None:
    capped = Shapes.of(Gemma2Config(**SIZES, head_dim=16))
    work = dataclasses.replace(WORK, answered_tokens=1000)
    more = answers_bytes(capped, work, 200) - answers_bytes(SHAPES, work, 200)
    scores = 200 * 1000 * 4  # questions, one query each to all tokens, heads
    assert 6 * scores < more < 20 * scores


def test_without_held_out_rows_or_questions_there_is_no_such_phase() -> None:
    alone = dataclasses.replace(WORK, evaluated_tokens=0, answered_tokens=0)
    assert other_phases(SHAPES, alone, 0).keys() == {"loading"}
    assert most_answers(SHAPES, alone, 0, 0) == 1
    assert other_phases(SHAPES, dataclasses.replace(WORK, device_type="cuda"), 0) == {}


def test_longer_rows_are_evaluated_too() -> None:
    twice = WORK.with_tokens(1024)
    assert (twice.evaluated_tokens, twice.answered_tokens) == (1024, 200)
