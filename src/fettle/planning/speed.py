"""The speed of a device, measured once and kept in the user's cache.

A CPU is measured on small parts, independent of the model (planning/cpu_speed.py). On a GPU one layer of the model is
timed (planning/gpu_probe.py), once per layer shape, dtype and LoRA setting.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fettle.events import Message, Report
from fettle.planning.costs import Workload
from fettle.planning.cpu_speed import CpuSpeed, measure
from fettle.planning.rates import Rates
from fettle.planning.shapes import Shapes
from fettle.planning.speed_cache import QUIET_CORES, Entry, OthersLoad, cache_file, device_key, keep, recall
from fettle.recompute.allocator import release_unused, restored_heap, set_heap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Speed = TypeVar("Speed", CpuSpeed, Rates)
GLANCE_SECONDS = 0.2
"""How long to check whether a machine that was busy during the measurement is quiet now."""


def device_rates(
    config: Callable[[], "PreTrainedConfig"],
    shapes: Shapes,
    work: Workload,
    device: torch.device,
    *,
    remeasure: bool,
    report: Report,
) -> Rates:
    """Return the rates for one model, from the cache or measured now, which is reported.

    config: returns the model's transformers config, which only the GPU measurement needs.
    """
    if device.type == "cpu":
        key = device_key(device, work.dtype)
        speed = _recalled(key, CpuSpeed.from_figures, remeasure=remeasure)
        if speed is None:
            speed = _measured(key, lambda: measure(work.dtype), device, report)
        return speed.rates(shapes, work)
    one_layer = dataclasses.replace(shapes, layers=1, windows=shapes.windows[:1])
    facts = (one_layer, work.dtype, work.is_nf4, work.rank, sorted(work.targets or ()))
    key = device_key(device, *facts)
    rates = _recalled(key, Rates.from_figures, remeasure=remeasure)
    if rates is not None:
        return rates
    from fettle.planning.gpu_probe import (
        probe,  # which imports PEFT: seconds that a plan on a CPU does not need
    )

    return _measured(key, lambda: probe(config(), shapes, work, device), device, report)


def _recalled(key: str, parse: Callable[[dict[str, Any]], Speed], *, remeasure: bool) -> Speed | None:
    """Return the cached speed, or None if it must be measured: none is cached, `remeasure` is set, or the machine was
    busy during the measurement and is quiet now."""
    found = None if remeasure else recall(key)
    if found is None or (found.was_busy and _is_quiet()):
        return None
    try:
        return parse(found.figures)
    except (ValueError, KeyError, TypeError, AttributeError):  # the file was edited by hand
        return None


def _is_quiet() -> bool:
    load = OthersLoad()
    time.sleep(GLANCE_SECONDS)
    return load.cores() < QUIET_CORES


def _measured(key: str, measure_now: Callable[[], Speed], device: torch.device, report: Report) -> Speed:
    def tell(line: str) -> None:
        report(Message(line, about="machine"))

    tell(f"measuring the speed of this {device.type} ...")
    load = OthersLoad()
    with restored_heap():
        if device.type == "cpu":
            set_heap("reuse")  # as training does
        speed = measure_now()
    release_unused()  # the memory of the timed layers
    others = load.cores()
    is_busy = device.type == "cpu" and others >= QUIET_CORES
    if is_busy:
        tell(
            f"other programs used {others:.1f} cores during the measurement, so the times below may be wrong. The next "
            "run on a quiet machine measures again, as does the option remeasure."
        )
    if not keep(key, Entry(speed.as_figures(), is_busy)):
        tell(f"{cache_file()} cannot be written, so every run measures the speed again.")
    return speed
