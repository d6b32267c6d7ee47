"""Activation offload: tensors saved for backward are kept in host memory, and copied while the GPU computes.

Copies run on a separate CUDA stream. When backward fetches an offloaded tensor, the copy of the one offloaded before
it, which backward needs next, is started.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager

import torch


class _Offloaded:
    """One tensor in host memory. before: the tensor offloaded before it, prefetched when this one is fetched."""

    def __init__(self, tensor: torch.Tensor, before: _Offloaded | None) -> None:
        self.before = before
        self.device = tensor.device
        self.fetched: torch.Tensor | None = None
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            self.host.copy_(tensor)
            return
        stream = _stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not reused before the copy is done
        _keep_pace(tensor.device)

    def start_fetch(self) -> None:
        if self.fetched is not None or self.device.type != "cuda":
            return
        with torch.cuda.stream(_stream(self.device)):
            self.fetched = self.host.to(self.device, non_blocking=True)

    def fetch(self) -> torch.Tensor:
        if self.device.type != "cuda":
            return self.host
        self.start_fetch()
        assert self.fetched is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(_stream(self.device))
        self.fetched.record_stream(current)
        tensor, self.fetched = self.fetched, None
        if self.before is not None:
            self.before.start_fetch()
            self.before = None
        _keep_pace(self.device)
        return tensor


_streams: dict[torch.device, torch.cuda.Stream] = {}
_last: weakref.WeakValueDictionary[torch.device, _Offloaded] = weakref.WeakValueDictionary()
"""The tensor offloaded last, per device; dropped once backward has fetched it."""


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


_marks: dict[torch.device, deque[torch.cuda.Event]] = {}
PACE = 2
"""How many copies Python may queue ahead of the GPU: all tensors queued ahead hold their memory at the same time."""


def _keep_pace(device: torch.device) -> None:
    marks = _marks.setdefault(device, deque())
    marks.append(torch.cuda.current_stream(device).record_event())
    if len(marks) > PACE:
        marks.popleft().synchronize()


def offloaded(x: torch.Tensor) -> AbstractContextManager[None]:
    """Within the block, save x in host memory whenever it is saved for backward."""
    place, shape = x.data_ptr(), x.shape  # not x itself, which would stay alive with the hook

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Offloaded:
        if tensor.data_ptr() != place or tensor.shape != shape:
            return tensor
        _last[tensor.device] = item = _Offloaded(tensor, _last.get(tensor.device))
        return item

    def unpack(packed: torch.Tensor | _Offloaded) -> torch.Tensor:
        return packed.fetch() if isinstance(packed, _Offloaded) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
