"""CPU threading and kernel caches: environment variables that PyTorch reads once, when it is imported.

PyTorch's OpenMP threads synchronize many times per layer, and by default they spin while they wait. Next to another
busy program the spinning threads keep the thread they wait for off the cores: a training step of the embedded model
took 11.5 s instead of 0.4 s. With passive waiting a step takes 0.45 s on an idle machine and 0.56 s next to a busy
program, where a single thread takes 0.65 s. So the number of threads need not depend on the machine's load, and it must
not: it determines the order of summation, and a repeated or resumed run must produce the same bits.

A CPU with bf16 arithmetic multiplies through oneDNN, which compiles code per matrix shape. Two caches of 1,024 entries
keep it, 0.57 MB per shape. Packed rows differ in length, so over 160 steps of the embedded model memory grew by 680 MB;
with 128 entries it grew by 160 MB at the same speed.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

PRIMITIVE_CACHE_ENTRIES = 128
"""Matrix shapes whose compiled code is cached. A training step has about 60, each used by every layer."""
PRIMITIVE_BYTES = 570_000
"""Compiled code and metadata per matrix shape."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's CPU quota: microseconds of CPU time (or "max") per period, and the period."""


def configure_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables for passive waiting, a container's CPU quota and small caches. Existing values are kept."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVE_CACHE_ENTRIES))
    environment.setdefault("LRU_CACHE_CAPACITY", str(PRIMITIVE_CACHE_ENTRIES))  # PyTorch's own cache
    cores, granted = _cores(), _granted_cores()
    if granted < cores:
        environment.setdefault("OMP_NUM_THREADS", str(granted))


def _cores() -> int:
    """Number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _granted_cores() -> float:
    """A container's CPU quota in cores, rounded up; infinity without a quota."""
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # not in a container, cgroup v1, or "max"
        return math.inf
