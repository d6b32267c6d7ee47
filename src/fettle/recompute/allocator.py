"""The C library's allocator on Linux, told what training needs of it.

By default each large tensor is a mapping of its own, handed back when freed: every step then pays for fresh
zeroed pages again (measured: 4% of a step of Phi-3.5-mini on a CPU, half of the unpacking of NF4).
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from fettle.ops.scratch import SHARED_BUFFER

Heap = Literal["default", "reuse", "return"]
"""reuse: tensors of up to 2 GB are served from the heap, and what is freed is kept for the next one. return: each
tensor over 1 MB is a mapping of its own, gone when freed: no more memory than is held, but slower. default: as the C
library ends up by its own adjusting."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**31 - 1
_THRESHOLDS = {"default": (2**26, 2**25), "reuse": (_LARGEST, _LARGEST), "return": (_LARGEST, 2**20)}

_current: Heap = "default"


def set_heap(heap: Heap) -> None:
    """Choose what happens to freed memory from now on."""
    global _current
    if heap != _current and (libc := _glibc()) is not None:
        trim, mmap = _THRESHOLDS[heap]
        libc.mallopt(_MMAP_THRESHOLD, mmap)
        libc.mallopt(_TRIM_THRESHOLD, trim)
        if _current == "reuse":
            libc.malloc_trim(0)  # what was kept
    _current = heap


@contextmanager
def restored_heap() -> Iterator[None]:
    """Let the block choose what happens to freed memory; afterwards it is as it was."""
    before = _current
    try:
        yield
    finally:
        SHARED_BUFFER.release()
        set_heap(before)


def release_unused() -> None:
    """Hand everything that is free back to the system."""
    gc.collect()
    SHARED_BUFFER.release()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """None where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
