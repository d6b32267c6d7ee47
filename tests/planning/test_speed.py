"""A device is measured once; what it means for a model follows from the model's shapes."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from fettle.events import Event, Message
from fettle.planning import speed, speed_cache
from fettle.planning.costs import Workload
from fettle.planning.cpu_speed import CpuSpeed, Pass
from fettle.planning.rates import Line, PairSeconds, Rates
from fettle.planning.shapes import Shapes
from fettle.planning.speed import device_rates
from fettle.recompute.policies import Policy

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=80
)
MEASURED = CpuSpeed(
    products={128: 1e10, 512: 2e10},
    forward=Pass(1e-3, 1e-9),
    backward=Pass(2e-3, 2e-9),
    weight=1e-10,
    nf4_weight=1e-9,
    attention={64: (1e-9, 2e-9), 1024: (1e-10, 2e-10)},
    logit=1e-8,
    update=1e-8,
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with an empty cache; `runs` counts measurements, `others` is how many cores other programs use."""
    machine = SimpleNamespace(runs=0, others=0.0)

    def measure(dtype):
        machine.runs += 1
        return MEASURED

    class Load:
        def cores(self):
            return machine.others

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "measure", measure)
    monkeypatch.setattr(speed, "OthersLoad", Load)
    monkeypatch.setattr(speed, "GLANCE_SECONDS", 0.0)
    return machine


BF16 = Workload(tokens=64)


def told(work: Workload = BF16, *, remeasure: bool = False) -> str:
    """What is reported when the rates are asked for."""
    reported: list[Event] = []
    found = device_rates(
        lambda: CONFIG, Shapes.of(CONFIG), work, CPU, remeasure=remeasure, report=reported.append
    )
    assert found == MEASURED.rates(Shapes.of(CONFIG), work)
    assert all(isinstance(event, Message) and event.about == "machine" for event in reported)
    return "\n".join(event.text for event in reported if isinstance(event, Message))


def test_a_device_is_measured_once_for_each_dtype(machine):
    assert "measuring the speed of this cpu" in told()
    assert told() == "" and machine.runs == 1
    told(Workload(tokens=64, rank=4, is_nf4=True))
    assert machine.runs == 1
    told(Workload(tokens=64, dtype=torch.float32))
    assert machine.runs == 2


def test_it_is_measured_again_on_request_and_when_a_library_has_changed(machine, monkeypatch):
    told()
    told(remeasure=True)
    assert machine.runs == 2
    monkeypatch.setattr(torch, "__version__", "99.0")
    told()
    assert machine.runs == 3


def test_a_busy_machine_is_reported_and_measured_again_when_it_is_quiet(machine):
    machine.others = 1.0
    assert "other programs used 1.0 cores" in told()
    assert told() == "" and machine.runs == 1
    machine.others = 0.0
    assert "other programs" not in told() and machine.runs == 2
    told()
    assert machine.runs == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 99, "entries": {}}', '{"version": 1}', "\x00"]
)
def test_a_broken_cache_counts_as_empty(machine, content):
    told()
    speed_cache.cache_file().write_text(content)
    told()
    assert machine.runs == 2
    assert json.loads(speed_cache.cache_file().read_text())["version"] == speed_cache.VERSION


def test_figures_edited_by_hand_are_measured_again(machine):
    told()
    content = json.loads(speed_cache.cache_file().read_text())
    for entry in content["entries"].values():
        entry["figures"]["products"] = "fast"
    speed_cache.cache_file().write_text(json.dumps(content))
    told()
    assert machine.runs == 2


def test_without_a_place_for_the_cache_it_is_measured_each_time(machine, tmp_path):
    (tmp_path / "fettle").write_text("a file where the folder would be")
    told()
    told()
    assert machine.runs == 2


def test_figures_survive_the_file():
    assert CpuSpeed.from_figures(json.loads(json.dumps(MEASURED.as_figures()))) == MEASURED
    rates = Rates({policy: Line(0.1, 0.2) for policy in Policy}, {64: PairSeconds(1, 2)}, 1.0, 2.0, 3.0)
    assert Rates.from_figures(json.loads(json.dumps(rates.as_figures()))) == rates


def test_more_work_takes_longer():
    shapes = Shapes.of(CONFIG)
    rates = MEASURED.rates(shapes, Workload(tokens=64))
    seconds = [rates.layers[policy].at(512) for policy in Policy if policy != Policy.OFFLOAD]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    for changes in ({"is_nf4": True}, {"rank": 64}):
        slower = MEASURED.rates(shapes, Workload(tokens=64, **changes))
        assert slower.layers[Policy.KEEP].at(512) > rates.layers[Policy.KEEP].at(512)


def test_a_layer_takes_what_its_parts_take():
    """Two products of all weights, elements and calls of both passes, and the weights brought into form twice."""
    shapes = Shapes.of(CONFIG)
    weights = shapes.layer_weights
    elements = 6 * 64 + 3 * (64 + 2 * 64) + 4 * 96
    per_token = 2 * 2 * weights / 1e10 + elements * 3e-9
    line = MEASURED.rates(shapes, Workload(tokens=64)).layers[Policy.KEEP]
    assert line.per_token == pytest.approx(per_token)
    assert line.fixed == pytest.approx(3e-3 + 2 * weights * 1e-10)


def test_the_real_measurement_is_all_positive(monkeypatch):
    from fettle.planning import cpu_speed

    monkeypatch.setattr(cpu_speed, "ENOUGH_SECONDS", 0.001)
    found = cpu_speed.measure(torch.float32)
    assert min(found.products.values()) > 1e8
    assert found.forward.call > 0 and found.backward.call > 0 and found.update > 0
    assert all(ahead > 0 and behind > 0 for ahead, behind in found.attention.values())
    assert found.weight == 0 < found.nf4_weight
