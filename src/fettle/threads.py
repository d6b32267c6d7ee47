"""How many threads compute on a CPU, how they wait, and how many compiled products are kept.

To be settled before PyTorch is imported, which reads it once.

PyTorch's threads (OpenMP) wait for each other many times in every layer. By default they spin meanwhile. Beside
another busy program the thread that is waited for gets no core as long as the other one spins: a training step of the
embedded model took 11.5 s instead of 0.4. Asleep while waiting they take 0.45 s on a quiet machine and 0.56 beside a
busy program, where a single thread takes 0.65. So the number of threads need not follow the machine's load, and must
not: it decides in which order sums are made, and a run that is repeated or resumed has to end in the same bits.

A CPU with bf16 arithmetic multiplies through oneDNN, which compiles code for each shape of a product. Two caches of
1,024 entries keep it, 0.57 MB for a shape. Packed rows differ in length, so 160 steps of the embedded model grew by
680 MB; with 128 entries by 160, and a step takes as long.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

KEPT_PRODUCTS = 128
"""Shapes of products whose compiled code is kept. A training step has about 60, each used by every layer."""
PRODUCT_BYTES = 570_000
"""Of the code and notes for one."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of processor time, or "max", and the period that they are granted for."""


def settle_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what PyTorch and its libraries read; what is set already wins.

    Threads sleep while they wait, there are no more of them than a container may use, and few products are kept.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))
    environment.setdefault("LRU_CACHE_CAPACITY", str(KEPT_PRODUCTS))  # PyTorch's own, on top of oneDNN's
    cores, granted = _cores(), _granted_cores()
    if granted < cores:
        environment.setdefault("OMP_NUM_THREADS", str(granted))


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _granted_cores() -> float:
    """What a container's quota comes to, rounded up; infinity without one."""
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no container, of version 1, or "max"
        return math.inf
