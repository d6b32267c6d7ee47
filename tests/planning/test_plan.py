"""The search over policies, with rates made up so that every trade is open: against trying all assignments."""

import dataclasses
import itertools

import pytest
from transformers import Gemma2Config, LlamaConfig

from fettle.options import flag
from fettle.planning.costs import Workload
from fettle.planning.plan import NEAR, Plan, Planner, allowed_policies, least_peak
from fettle.planning.rates import Line, PairSeconds, Rates
from fettle.planning.report import refusal, rounded_seconds
from fettle.planning.shapes import Shapes
from fettle.planning.step_time import EAGER_SECONDS, TENSOR_SECONDS
from fettle.recompute.policies import Policy

FOUR = (Policy.KEEP, Policy.RECOMPUTE_NORMS, Policy.RECOMPUTE_MLP, Policy.RECOMPUTE)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
WORK = Workload(tokens=3000, rank=8)
LEAN = dataclasses.replace(WORK, returns_memory=True)


def rates() -> Rates:
    seconds = {policy: 1.0 + 0.13 * place**1.5 for place, policy in enumerate(Policy)}
    return Rates(
        layers={policy: Line(1e-3, each * 1e-5) for policy, each in seconds.items()},
        attention={512: PairSeconds(1e-10, 2e-10)},
        head=1e-6,
        products=1e11,
        update=1e-9,
    )


@pytest.fixture
def planner() -> Planner:
    return Planner(Shapes.of(LlamaConfig(**SIZES)), rates(), accumulation=2, base=10**6)


def all_plans(planner: Planner, works: tuple[Workload, ...] = (WORK, LEAN)) -> list[Plan]:
    every = itertools.product(works, itertools.product(FOUR, repeat=4))
    return [planner.plan(work, policies) for work, policies in every]


def budgets(plans: list[Plan]) -> list[int]:
    peaks = sorted({plan.peak for plan in plans})
    return [budget + extra for budget in peaks[:: max(1, len(peaks) // 25)] for extra in (0, 1)]


def test_no_assignment_that_fits_is_faster_by_more_than_noise(planner: Planner) -> None:
    plans = all_plans(planner)
    for budget in budgets(plans):
        best = planner.best(WORK, budget, FOUR)
        fastest = min(plan.seconds for plan in plans if plan.peak <= budget)
        assert best is not None and best.peak <= budget
        assert best.seconds <= NEAR * fastest


def test_more_memory_gives_no_slower_plan(planner: Planner) -> None:
    plans = [planner.best(WORK, budget, FOUR) for budget in budgets(all_plans(planner))]
    seconds = [plan.seconds for plan in plans if plan is not None]
    assert len(seconds) == len(plans)
    assert all(later <= NEAR * min(seconds[:i]) for i, later in enumerate(seconds) if i)
    assert seconds[0] > seconds[-1]


def least(planner: Planner, work: Workload = WORK) -> int:
    return least_peak(planner.shapes, work, FOUR, planner.base)


def test_the_least_peak_is_the_lowest_of_all(planner: Planner) -> None:
    assert least(planner) == min(plan.peak for plan in all_plans(planner))
    assert planner.best(WORK, least(planner), FOUR) is not None
    assert planner.best(WORK, least(planner) - 1, FOUR) is None


@pytest.mark.parametrize("tokens", [300, 3000, 30000])
def test_the_least_peak_on_a_gpu(planner: Planner, tokens: int) -> None:
    work = Workload(tokens=tokens, rank=8, device_type="cuda")
    outer = dataclasses.replace(work, has_offloaded_embedding=True)
    assert least(planner, work) == min(plan.peak for plan in all_plans(planner, (work, outer)))


def test_advice_is_given_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of advice once searched through all assignments: half a minute for a model of 42 layers."""
    monkeypatch.setattr("fettle.planning.plan._choices", None)
    shapes = Shapes.of(Gemma2Config())
    work = Workload(tokens=8 * 4096, documents=8, batch_size=8)
    error = refusal(shapes, work, tuple(Policy), base=0, budget=10**9, length_option="max_length")
    assert "batch_size 1 saves" in str(error) and "max_length 2048 saves" in str(error)
    assert "--batch-size 1 saves" in error.worded(flag) and "--max-length 2048 saves" in error.worded(flag)


def test_layers_that_are_redone_come_first(planner: Planner) -> None:
    plans = all_plans(planner)
    for budget in budgets(plans):
        best = planner.best(WORK, budget, FOUR)
        assert best is not None and list(best.policies) == sorted(
            best.policies, key=list(Policy).index, reverse=True
        )


def test_the_longest_row_is_the_last_that_fits(planner: Planner) -> None:
    budget = least(planner) + 12345
    longest = planner.longest(WORK, budget, FOUR)

    def peak(tokens: int) -> int:
        return planner.plan(LEAN.with_tokens(tokens), (Policy.RECOMPUTE,) * 4).peak

    assert WORK.tokens <= longest < 4096
    assert peak(longest) <= budget < peak(longest + 1)
    assert planner.longest(WORK, 10**12, FOUR) == 4096  # the context
    assert planner.longest(WORK, 10**5, FOUR) == 0  # not even the weights


def test_a_plan_adds_up(planner: Planner) -> None:
    plan = planner.plan(WORK, FOUR)
    parts = (plan.base, plan.weights, plan.adapters, plan.optimizer, plan.activations, plan.workspace)
    assert plan.peak == sum(parts) and min(parts) > 0
    assert plan.tokens == 2 * WORK.tokens
    assert plan.counts() == dict.fromkeys(FOUR, 1)


def test_windows_and_documents_make_a_plan_faster() -> None:
    sizes = SIZES | {"head_dim": 16}
    wide, narrow = (Planner(Shapes.of(Gemma2Config(**sizes, sliding_window=n)), rates()) for n in (4096, 64))
    policies = (Policy.KEEP,) * 4
    assert narrow.plan(WORK, policies).seconds < wide.plan(WORK, policies).seconds
    many = Workload(tokens=3000, documents=30, rank=8)
    assert wide.plan(many, policies).seconds < wide.plan(WORK, policies).seconds


def test_the_longest_context_is_that_of_one_row(planner: Planner) -> None:
    two = dataclasses.replace(WORK, tokens=3000, documents=2, batch_size=2)
    longest = planner.longest(two, least(planner, two), FOUR)
    assert 1500 <= longest < 1510


@pytest.mark.parametrize("is_tied", [False, True])
def test_on_a_gpu_the_embedding_moves_out_where_that_is_worth_it(planner: Planner, is_tied: bool) -> None:
    shapes = Shapes.of(LlamaConfig(**SIZES, tie_word_embeddings=is_tied))
    on_gpu = dataclasses.replace(planner, shapes=shapes)
    work = dataclasses.replace(WORK, device_type="cuda")
    roomy = on_gpu.best(work, 10**12, FOUR)
    assert roomy is not None and not roomy.work.has_offloaded_embedding
    tight = on_gpu.best(work, least(on_gpu, work), FOUR)
    assert tight is not None and tight.work.has_offloaded_embedding is not is_tied
    inside = on_gpu.plan(work, tight.policies)
    table = 0 if is_tied else SIZES["vocab_size"] * SIZES["hidden_size"] * work.item
    assert inside.weights - tight.weights == table


def test_memory_is_given_back_at_once_only_where_it_must(planner: Planner) -> None:
    roomy = planner.best(WORK, 10**12, FOUR)
    assert roomy is not None and not roomy.work.returns_memory
    leanest_heap = planner.plan(WORK, (Policy.RECOMPUTE,) * 4).peak
    tight = planner.best(WORK, leanest_heap - 1, FOUR)
    assert tight is not None and tight.work.returns_memory and tight.seconds > roomy.seconds


def test_a_tiny_model_takes_what_its_many_tensors_take(planner: Planner) -> None:
    """On a CPU the optimiser goes from tensor to tensor; where each is small that is a good part of the step."""
    work = Workload(tokens=8, rank=1)
    one = dataclasses.replace(work, targets={"o_proj": 1})
    every, single = (planner.plan(each, (Policy.KEEP,) * 4).seconds for each in (work, one))
    assert every - single == pytest.approx(TENSOR_SECONDS["cpu"] * 2 * (4 * 7 - 1), rel=0.01)


def test_without_a_cuda_graph_a_step_takes_at_least_the_kernel_launches(planner: Planner) -> None:
    quick = {policy: Line(0, 0) for policy in Policy}
    idle = dataclasses.replace(planner, accumulation=1, rates=dataclasses.replace(rates(), layers=quick))
    eager = Workload(tokens=8, device_type="cuda", has_dropout=True)
    works = (dataclasses.replace(eager, has_dropout=False), eager)
    graph, launched = (idle.plan(work, (Policy.KEEP,) * 4).seconds for work in works)
    assert launched - graph == pytest.approx(4 * EAGER_SECONDS, rel=0.01)


def test_noise_does_not_decide_between_plans(planner: Planner) -> None:
    """Redoing that seems a little faster is not chosen where everything could be kept."""
    measured = planner.rates
    for noise in (0.995, 1.005):
        layers = measured.layers | {
            Policy.RECOMPUTE_NORMS: Line(1e-3, measured.layers[Policy.KEEP].per_token * noise),
        }
        noisy = dataclasses.replace(planner, rates=dataclasses.replace(measured, layers=layers))
        best = noisy.best(WORK, 10**12, FOUR)
        assert best is not None and best.policies == (Policy.KEEP,) * 4


def test_advice_speaks_of_one_row_and_of_the_batch_first(planner: Planner) -> None:
    rows = Workload(tokens=64 * 1000, documents=64, batch_size=64)
    budget = least(planner, rows.with_batch_size(4))  # an eighth more rows would not fit
    allowed = allowed_policies(planner.shapes, rows, None)
    sentence = str(
        refusal(planner.shapes, rows, allowed, base=planner.base, budget=budget, length_option="context")
    )
    assert "context 500 saves" in sentence
    assert "To need less: batch_size 4 saves" in sentence


@pytest.mark.parametrize(
    ("seconds", "text"), [(284.2, "280 s"), (28421.0, "28,000 s"), (1.34, "1.3 s"), (0.0482, "0.048 s")]
)
def test_seconds_have_two_figures_and_no_exponent(seconds: float, text: str) -> None:
    assert rounded_seconds(seconds) == text
