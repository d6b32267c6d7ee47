"""A scratch buffer for matrices that are computed with in another format than they are stored in.

That is NF4, which is unpacked, and bf16 on a CPU without bf16 arithmetic, which is widened to fp32. On a CPU every such
matrix reuses one buffer. A fresh allocation per matrix would cost page faults that take as long as the unpacking, or
fragment the heap between the activations that layers keep.
"""

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fettle.ops.nf4 import Nf4, dense, nf4_dequantize

ALIGNMENT = 64
"""Bytes: one cache line."""


class ScratchBuffer:
    """One piece of memory for one user at a time; it grows to the largest size requested."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory: torch.Tensor | None = None

    def carve(self, shapes: Sequence[torch.Size], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return uninitialized tensors of these shapes, next to each other in the buffer."""
        sizes = [-(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape in shapes]
        if self.memory is None or len(self.memory) < sum(sizes):
            self.memory = None  # free the old buffer before the larger one is allocated
            # A mapping of its own: on the heap it would leave a gap each time it grows.
            # An inference tensor, made during generation, could not be written to in training.
            with torch.inference_mode(False):
                self.memory = torch.frombuffer(mmap.mmap(-1, max(1, sum(sizes))), dtype=torch.uint8)
        parts = self.memory[: sum(sizes)].split(sizes)
        return [
            part[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def release(self) -> None:
        """Return the memory to the system, unless it is in use."""
        if self.lock.acquire(blocking=False):
            self.memory = None
            self.lock.release()


SHARED_BUFFER = ScratchBuffer()


@contextmanager
def dense_weights(weights: Sequence[torch.Tensor | Nf4], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Yield the matrices, dense and in `dtype`; valid within the block only, as the next block reuses the memory.

    A nested block, or one in another thread, finds the buffer in use and allocates its own memory.
    """
    changing = [weight for weight in weights if _changes(weight, dtype)]
    if not changing or _device(changing[0]) != "cpu" or not SHARED_BUFFER.lock.acquire(blocking=False):
        yield [dense(weight, dtype) for weight in weights]
        return
    try:
        places = iter(SHARED_BUFFER.carve([weight.shape for weight in changing], dtype))
        yield [_put(each, next(places)) if _changes(each, dtype) else dense(each, dtype) for each in weights]
    finally:
        SHARED_BUFFER.lock.release()


@contextmanager
def scratch(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Yield uninitialized tensors of these shapes, valid within the block only.

    On a CPU they share the buffer of `dense_weights`; code that needs them never runs inside a layer.
    """
    if device.type != "cpu" or not SHARED_BUFFER.lock.acquire(blocking=False):
        yield [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        return
    try:
        yield SHARED_BUFFER.carve(shapes, dtype)
    finally:
        SHARED_BUFFER.lock.release()


def _changes(weight: torch.Tensor | Nf4, dtype: torch.dtype) -> bool:
    """Whether the matrix has to be unpacked or converted."""
    return isinstance(weight, Nf4) or weight.dtype != dtype


def _put(weight: torch.Tensor | Nf4, place: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, Nf4):
        return nf4_dequantize(weight, place.dtype, out=place)
    return place.copy_(weight)


def _device(weight: torch.Tensor | Nf4) -> str:
    return (weight.packed if isinstance(weight, Nf4) else weight).device.type
