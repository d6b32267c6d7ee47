"""Tensors that wait for backward in host memory, moved while the GPU computes.

Copies run on a stream of their own. When one offloaded tensor is asked for, the one offloaded before it, which
backward needs next, is already fetched.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager

import torch


class _Parked:
    """One tensor in host memory."""

    def __init__(self, tensor: torch.Tensor, before: _Parked | None) -> None:
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
        tensor.record_stream(stream)  # its memory is not given away before the copy is done
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
_last: weakref.WeakValueDictionary[torch.device, _Parked] = weakref.WeakValueDictionary()
"""The tensor offloaded last, gone once backward has taken it."""


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


_marks: dict[torch.device, deque[torch.cuda.Event]] = {}
PACE = 2
"""Layers that Python may be ahead of the GPU: the memory of every one it queues beyond would be held at once."""


def _keep_pace(device: torch.device) -> None:
    marks = _marks.setdefault(device, deque())
    marks.append(torch.cuda.current_stream(device).record_event())
    if len(marks) > PACE:
        marks.popleft().synchronize()


def offloaded(x: torch.Tensor) -> AbstractContextManager[None]:
    """Within the block, x, where it is saved for backward, is saved in host memory."""

    place, shape = x.data_ptr(), x.shape  # not x itself, which would stay alive with the hook

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Parked:
        if tensor.data_ptr() != place or tensor.shape != shape:
            return tensor
        _last[tensor.device] = item = _Parked(tensor, _last.get(tensor.device))
        return item

    def unpack(packed: torch.Tensor | _Parked) -> torch.Tensor:
        return packed.fetch() if isinstance(packed, _Parked) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
