"""Matrices at work in another form than they are held in: NF4 unpacked, bf16 in fp32 where the CPU has no bf16.

On a CPU each goes where the one before it was. Memory asked for anew would be pages that the system has to find and
clear first, which takes as long as the unpacking, or lie between what layers keep and leave gaps.
"""

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fettle.ops.nf4 import Nf4, dense, nf4_dequantize

ALIGNMENT = 64
"""Bytes: a line of the cache."""


class Room:
    """One piece of memory, for one user at a time; it grows to what the largest user asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory: torch.Tensor | None = None

    def carve(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> list[torch.Tensor]:
        """Tensors of these shapes side by side, their contents undefined."""
        sizes = [-(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape in shapes]
        if self.memory is None or len(self.memory) < sum(sizes):
            self.memory = None  # before the larger one is there
            # of its own, not from the heap, where it would leave a gap each time it grows
            with torch.inference_mode(False):  # or training could not write into it after generation has
                self.memory = torch.frombuffer(mmap.mmap(-1, max(1, sum(sizes))), dtype=torch.uint8)
        parts = self.memory[: sum(sizes)].split(sizes)
        return [
            part[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def release(self) -> None:
        """Give the memory back, unless it is in use."""
        if self.lock.acquire(blocking=False):
            self.memory = None
            self.lock.release()


ROOM = Room()


@contextmanager
def at_work(weights: Sequence[torch.Tensor | Nf4], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """The matrices in `dtype`, within the block only: afterwards their memory is the next one's."""
    changing = [weight for weight in weights if _changes(weight, dtype)]
    if not changing or _device(changing[0]) != "cpu" or not ROOM.lock.acquire(blocking=False):
        yield [dense(weight, dtype) for weight in weights]
        return
    try:
        places = iter(ROOM.carve([weight.shape for weight in changing], dtype))
        yield [_put(each, next(places)) if _changes(each, dtype) else dense(each, dtype) for each in weights]
    finally:
        ROOM.lock.release()


@contextmanager
def scratch(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Uninitialised tensors of these shapes, within the block only. On a CPU they share the memory of `at_work`: what
    needs them never runs inside a layer."""
    if device.type != "cpu" or not ROOM.lock.acquire(blocking=False):
        yield [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        return
    try:
        yield ROOM.carve(shapes, dtype)
    finally:
        ROOM.lock.release()


def _changes(weight: torch.Tensor | Nf4, dtype: torch.dtype) -> bool:
    """Whether the matrix is used in another form than it is held in."""
    return isinstance(weight, Nf4) or weight.dtype != dtype


def _put(weight: torch.Tensor | Nf4, place: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, Nf4):
        return nf4_dequantize(weight, place.dtype, out=place)
    return place.copy_(weight)


def _device(weight: torch.Tensor | Nf4) -> str:
    return (weight.packed if isinstance(weight, Nf4) else weight).device.type
