"""Measured speeds in the user's cache: a device is measured once, and again when it, or a library, has changed.

    ~/.cache/fettle/speed.json     {"version": 2, "entries": {key: {"figures": ..., "was_busy": ...}}}

A file that cannot be read, or that another version wrote, counts as empty; one that cannot be written is done without.
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

VERSION = 2
QUIET_CORES = 0.3
"""Other programs that use less than this many cores disturb no measurement."""


UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a file of any content can raise."""


class Entry(NamedTuple):
    """What was measured. was_busy: other programs were at work meanwhile."""

    figures: dict[str, Any]
    was_busy: bool


class OthersLoad:
    """How many cores other programs use, from the making of this object on."""

    def __init__(self) -> None:
        self.began = self._busy_seconds()

    def cores(self) -> float:
        (all_then, own_then, then), (all_now, own_now, now) = self.began, self._busy_seconds()
        return max(0.0, (all_now - all_then - own_now + own_then) / max(1e-6, now - then))

    @staticmethod
    def _busy_seconds() -> tuple[float, float, float]:
        """Of all programs, of this one, and the clock; in seconds."""
        total = psutil.cpu_times()
        idle = total.idle + getattr(total, "iowait", 0.0)
        clock = sum(total) - getattr(total, "guest", 0.0) - getattr(total, "guest_nice", 0.0)
        return clock - idle, time.process_time(), clock / (psutil.cpu_count() or 1)


def device_key(device: torch.device, *facts: object) -> str:
    """Name what a measurement depends on: the device, the libraries, and the `facts` about what was timed."""
    if device.type == "cuda":
        where = [torch.cuda.get_device_name(device), f"triton {version_of('triton')}"]
    else:
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability())
        where = [_processor(), f"{torch.get_num_threads()} threads", isa]
    return ", ".join(
        [*where, f"torch {torch.__version__}", f"fettle {version_of('fettle-llm')}", *map(str, facts)]
    )


def recall(key: str) -> Entry | None:
    """Return what is in the cache for `key`, or None."""
    with suppress(*UNREADABLE):
        found = _entries()[key]
        return Entry(dict(found["figures"]), bool(found["was_busy"]))
    return None


def keep(key: str, entry: Entry) -> bool:
    """Put the entry into the cache; return whether it could be written."""
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
    """The file, by the XDG convention."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fettle" / "speed.json"


def _entries() -> dict[str, Any]:
    content = json.loads(cache_file().read_text(encoding="utf-8"))
    return dict(content["entries"]) if content["version"] == VERSION else {}


def _processor() -> str:
    """The processor's name with its family and model: some clouds give all of theirs the same name."""
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
