"""The memory of this process, and of a training process before its model is loaded.

`fettle plan` does not import what training imports, so its own size says nothing: it uses the size that earlier runs
with the same libraries recorded in the user's cache.
"""

import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from fettle.planning.speed_cache import Entry, keep, recall, version_of

UNSEEN_BYTES = 568_000_000
"""Size of a training process if no run recorded one: Python and its libraries, measured with the tested versions."""


def note_program() -> None:
    """Record the resident size of this process, which has imported all that training needs and read no data yet.

    Keeps the smallest size seen: a notebook or server process holds other data as well.
    """
    seen = recall(_key())
    size = int(psutil.Process().memory_info().rss)
    if seen is None or size < program_bytes():
        keep(_key(), Entry({"bytes": size}, was_busy=False))


def program_bytes() -> int:
    """Return the smallest recorded size of a training process with these libraries in bytes, or UNSEEN_BYTES."""
    entry = recall(_key())
    found = entry.figures.get("bytes") if entry else None
    return found if isinstance(found, int) and found > 0 else UNSEEN_BYTES


def _key() -> str:
    packages = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "fettle-llm")
    return ", ".join(
        [f"program, python {platform.python_version()}", *(f"{p} {version_of(p)}" for p in packages)]
    )


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Return the most bytes in use so far: allocated on a GPU, resident in this process otherwise.

    device: by default the GPU if there is one.
    """
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    # On Linux getrusage's peak is inherited from the parent process, so VmHWM is read first.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return _resident_peak_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Reset the peak that `peak_memory_bytes` returns, if the system supports it."""
    if _is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _is_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"


def _resident_peak_bytes() -> int | None:
    """Return VmHWM of /proc/self/status in bytes, or None if there is no such file or field."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
