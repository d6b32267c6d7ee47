"""Measured speeds in the user's cache: a device is measured once, and again after it or a library changes.

    ~/.cache/fettle/speed.json     {"version": 3, "entries": {key: {"figures": ..., "was_busy": ...}}}

A file that cannot be read, or that another version wrote, counts as empty. If it cannot be written, nothing is kept.
"""

import json
import os
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from fettle.errors import UserError
from fettle.files import write_aside

VERSION = 3
QUIET_CORES = 0.3
"""Other programs that use fewer cores than this do not disturb a measurement."""


UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""The exceptions that reading a file with arbitrary content can raise."""


class Entry(NamedTuple):
    """One measurement. was_busy: other programs were active during it."""

    figures: dict[str, Any]
    was_busy: bool


class OthersLoad:
    """Measures how many cores other programs use, from the creation of this object on."""

    def __init__(self) -> None:
        self.began = self._busy_seconds()

    def cores(self) -> float:
        """Return the average number of cores that other programs have used so far."""
        (all_then, own_then, then), (all_now, own_now, now) = self.began, self._busy_seconds()
        return max(0.0, (all_now - all_then - own_now + own_then) / max(1e-6, now - then))

    @staticmethod
    def _busy_seconds() -> tuple[float, float, float]:
        """Return seconds: CPU time of all programs, CPU time of this process, and elapsed time."""
        total = psutil.cpu_times()
        idle = total.idle + getattr(total, "iowait", 0.0)
        clock = sum(total) - getattr(total, "guest", 0.0) - getattr(total, "guest_nice", 0.0)
        return clock - idle, time.process_time(), clock / (psutil.cpu_count() or 1)


def device_key(device: torch.device, *facts: object) -> str:
    """Return a cache key of what a measurement depends on: the device, the libraries, and `facts` on what was timed."""
    if device.type == "cuda":
        where = [torch.cuda.get_device_name(device), f"triton {version_of('triton')}"]
    else:
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability())
        where = [_processor(), f"{torch.get_num_threads()} threads", isa]
    return ", ".join(
        [*where, f"torch {torch.__version__}", f"fettle {version_of('fettle-llm')}", *map(str, facts)]
    )


def recall(key: str) -> Entry | None:
    """Return the cached entry for `key`, or None."""
    with suppress(*UNREADABLE):
        found = _entries()[key]
        return Entry(dict(found["figures"]), bool(found["was_busy"]))
    return None


def keep(key: str, entry: Entry) -> bool:
    """Write the entry to the cache; return whether that succeeded."""
    with suppress(OSError, UserError):
        entries: dict[str, Any] = {}
        with suppress(*UNREADABLE):
            entries = _entries()
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": VERSION, "entries": entries | {key: entry._asdict()}}
        with write_aside(file, replace=True) as aside:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return True
    return False


def cache_file() -> Path:
    """Return the path of the cache file, by the XDG Base Directory Specification."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fettle" / "speed.json"


def _entries() -> dict[str, Any]:
    content = json.loads(cache_file().read_text(encoding="utf-8"))
    return dict(content["entries"]) if content["version"] == VERSION else {}


def _processor() -> str:
    """Return the processor's name, family and model: some clouds give all their processors the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model", "stepping")
    facts = dict(
        line.split(":", 1) for line in lines if line.partition(":")[0].strip() in wanted and ":" in line
    )
    return " ".join(value.strip() for value in facts.values()) or platform.machine()


def version_of(package: str) -> str:
    """Return the installed version of a package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
