"""What the probe makes of its timings: clocks and timings are made up."""

import pytest
import torch
from transformers import MistralConfig

from fettle.planning import gpu_probe as probe
from fettle.planning import timing
from fettle.planning.costs import Workload
from fettle.planning.rates import PairSeconds, visible_pairs
from fettle.planning.shapes import Shapes
from fettle.planning.timing import seconds_of
from fettle.recompute.policies import Policy

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("window", [None, 100])
def test_attention_within_a_window_is_taken_from_a_layers_time_as_such(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MistralConfig(**SIZES, vocab_size=64, num_hidden_layers=1, sliding_window=window)
    pair = PairSeconds(1e-6, 2e-6)
    bare = 1e-4  # seconds a token without attention

    def time_layer(model, policy, tokens, work, device) -> float:  # type: ignore[no-untyped-def]
        return bare * tokens + visible_pairs(tokens, window) * pair.of(policy)

    monkeypatch.setattr(probe, "_time_layer", time_layer)
    monkeypatch.setattr(probe, "_attention", lambda *_: pair)
    rates = probe.probe(config, Shapes.of(config), Workload(tokens=64), torch.device("cpu"))
    assert rates.layers[Policy.KEEP].per_token == pytest.approx(bare)
    assert rates.layers[Policy.KEEP].fixed == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("durations", "runs", "found"), [([0.6, 0.4, 0.2], 2, 0.4), ([3.2, 0.4], 1, 3.2), ([0.2] * 3, 2, 0.2)]
)
def test_one_run_counts_only_where_it_is_long(
    durations: list[float], runs: int, found: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, left = 0.0, iter(durations)

    def run() -> None:
        nonlocal now
        now += next(left)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert seconds_of(run, torch.device("cpu")) == pytest.approx(found)
    assert len(durations) - len(list(left)) == runs
