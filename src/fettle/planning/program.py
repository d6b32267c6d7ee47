"""What this process has in memory, and what a training process has before its model.

`fettle plan` answers without importing what training imports, so it cannot look at itself: it takes what runs with
these libraries noted in the user's cache.
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
"""Of a training program that has not run here yet: Python and its libraries, measured with the tested versions."""


def note_program() -> None:
    """Note how large this process is, which has imported all that training needs and read no data yet.

    The smallest size counts: the process of a notebook or a server holds other things as well.
    """
    seen = recall(_key())
    size = int(psutil.Process().memory_info().rss)
    if seen is None or size < program_bytes():
        keep(_key(), Entry({"bytes": size}, was_busy=False))


def program_bytes() -> int:
    """Return the smallest size that a training process with these libraries noted, or what is usual."""
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

    device: by default the GPU where there is one.
    """
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    # Linux hands getrusage's figure down from the parent process, so ask for this process's own first.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return _resident_peak_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Let `peak_memory_bytes` count from now on, where the system can do that."""
    if _is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _is_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() if device is None else device.type == "cuda"


def _resident_peak_bytes() -> int | None:
    """Return VmHWM of /proc/self/status in bytes, or None where there is no such file or field."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
