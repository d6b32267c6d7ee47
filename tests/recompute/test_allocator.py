"""What is asked of the C library's heap, and that it is taken back."""

import pytest

from fettle.recompute import allocator
from fettle.recompute.allocator import restored_heap, set_heap


class Libc:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.thresholds: dict[int, int] = {}

    def mallopt(self, which: int, value: int) -> None:
        self.thresholds[which] = value

    def malloc_trim(self, pad: int) -> None:
        """Nothing to trim."""


def test_the_heap_is_as_it_was_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc()
    monkeypatch.setattr(allocator, "_glibc", lambda: libc)
    monkeypatch.setattr(allocator, "_current", "default")
    set_heap("reuse")
    before = dict(libc.thresholds)
    with restored_heap():
        set_heap("return")
        inside = dict(libc.thresholds)
    assert libc.thresholds == before != inside
