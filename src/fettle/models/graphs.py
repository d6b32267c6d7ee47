"""All layers' forward and backward pass as two CUDA graphs, replayed at every step.

A step of a small model spends more time launching kernels from Python than running them. A graph is launched
once for all of its kernels. It is fixed in shape, so rows are padded to one length with a document of their own;
and in place, so inputs are copied in, and the adapters' gradients are added up inside the graph.

Passes without gradient, as preference training makes for its reference model, have a graph of their own for each
state of the adapters. It shares no memory with the other two, as it runs between them.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fettle.ops import Documents

Layers = Callable[..., torch.Tensor]

SHORTEST = 0.6
"""Rows below this share of the graph's length run without it: padding would cost more than launching."""


class LayerGraphs:
    """The graphs of one model for rows of up to `tokens` tokens; captured when first asked to `run`.

    layers: calls every layer, (x, cos_sin, documents) -> x. It must do the same in every call, without dropout, as
    long as `state` returns the same.
    """

    def __init__(
        self,
        layers: Layers,
        parameters: Iterable[nn.Parameter],
        tokens: int,
        state: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self.layers, self.tokens, self.state = layers, tokens, state
        self.trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.calls: Counter[Hashable] = Counter()
        self.captured: _Captured | None = None
        self.without_gradient: dict[Hashable, _Forward] = {}

    def serves(self, x: torch.Tensor) -> bool:
        """Whether to run x (B, N, E) here. The first call is not: it warms up what is compiled on first use.

        Nor is one between another's forward and backward pass: the graph's memory holds what that one kept.
        """
        if not SHORTEST * self.tokens <= x.shape[0] * x.shape[1] <= self.tokens:
            return False
        has_gradient = torch.is_grad_enabled()
        kind = has_gradient or self.state()
        self.calls[kind] += 1
        is_free = not has_gradient or self.captured is None or self.captured.open() is None
        return is_free and self.calls[kind] > 1 and not x.requires_grad

    def run(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], documents: Documents
    ) -> torch.Tensor:
        """Return what the layers return for x (B, N, E); gradients go to the trained parameters alone.

        documents: of all rows one after the other, which is how the graph sees them.
        """
        rows = x.reshape(1, -1, x.shape[-1])
        cos, sin = (each.expand(x.shape[0], -1, -1).reshape(1, -1, each.shape[-1]) for each in cos_sin)
        graph = self._graph(rows, (cos, sin), len(documents.bounds) + 1)  # one more for the padding
        graph.take(rows, (cos, sin), documents)
        if isinstance(graph, _Captured):
            output: torch.Tensor = _Replay.apply(graph, self.trained[0])
        else:
            output = graph.replay()
        return output[:, : rows.shape[1]].view_as(x)

    def _graph(
        self, rows: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], bounds: int
    ) -> "_Captured | _Forward":
        """The graph for this pass; recorded where there is none, or one for fewer documents."""
        size, state = 1 << (bounds - 1).bit_length(), self.state()
        if torch.is_grad_enabled():
            if self.captured is None or len(self.captured.documents.bounds) < bounds:
                self.captured = None  # its memory, first
                self.captured = _Captured(self, rows, cos_sin, size)
            return self.captured
        found = self.without_gradient.pop(state, None)
        if found is None or len(found.documents.bounds) < bounds:
            found = None
            found = _Forward(self, rows, cos_sin, size)
        self.without_gradient[state] = found
        return found


def active_adapters(layers: nn.Module) -> Callable[[], Hashable]:
    """What tells which adapters are at work: PEFT switches those of all layers together."""
    adapted: Any = next((each for each in layers.modules() if hasattr(each, "disable_adapters")), None)
    return lambda: None if adapted is None else (adapted.disable_adapters, tuple(adapted.active_adapters))


class _Inputs:
    """What a graph reads: always at the same place, always of the same shape."""

    def __init__(
        self, tokens: int, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], bounds: int
    ) -> None:
        device = x.device
        self.x = x.new_zeros(1, tokens, x.shape[-1])
        self.cos_sin = tuple(each.new_zeros(1, tokens, each.shape[-1]) for each in cos_sin)
        self.documents = Documents(
            lengths=torch.empty(0, device=device),
            starts=torch.zeros(tokens, dtype=torch.int32, device=device),
            bounds=torch.full((bounds,), tokens, dtype=torch.int32, device=device),
            longest=tokens,
        )
        self.documents.bounds[0] = 0

    def take(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], documents: Documents) -> None:
        """Copy the inputs in; what is beyond them is padding, a document of its own."""
        length = x.shape[1]
        for static, given in zip((self.x, *self.cos_sin), (x, *cos_sin), strict=True):
            static[:, :length].copy_(given)
            static[:, length:].zero_()
        starts, bounds = self.documents.starts, self.documents.bounds
        starts[:length].copy_(documents.starts)
        starts[length:].fill_(length)
        bounds[: len(documents.bounds)].copy_(documents.bounds)
        bounds[len(documents.bounds) :].fill_(self.x.shape[1])


class _Forward(_Inputs):
    """A pass without gradient."""

    def __init__(
        self, owner: LayerGraphs, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], bounds: int
    ) -> None:
        super().__init__(owner.tokens, x, cos_sin, bounds)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(x.device)
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.output = owner.layers(self.x, self.cos_sin, self.documents)

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.output.clone()


class _Captured(_Inputs):
    """A forward and a backward pass."""

    def __init__(
        self, owner: LayerGraphs, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], bounds: int
    ) -> None:
        super().__init__(owner.tokens, x, cos_sin, bounds)
        device = x.device
        self.open: Callable[[], Any] = lambda: None
        """The forward pass whose backward pass is still to come, if there is one."""
        self.trained = owner.trained
        self.sums = torch.zeros(sum(p.numel() for p in self.trained), device=device)
        sizes = [parameter.numel() for parameter in self.trained]
        self.views = [part.view_as(p) for part, p in zip(self.sums.split(sizes), self.trained, strict=True)]
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward), torch.enable_grad():
            self.output = owner.layers(self.x, self.cos_sin, self.documents)
        self.grad = torch.zeros_like(self.output)
        before = [parameter.grad for parameter in self.trained]
        for parameter, view in zip(self.trained, self.views, strict=True):
            parameter.grad = view
        with torch.cuda.graph(self.backward, pool=self.forward.pool()):
            # adds each gradient to its view and lets it go, where torch.autograd.grad would hand out all at once
            torch.autograd.backward(self.output, self.grad, inputs=self.trained)
        for parameter, gradient in zip(self.trained, before, strict=True):
            parameter.grad = gradient
        self.output = self.output.detach()

    def begin_sum(self) -> None:
        """Make the parameters' gradients views of one tensor, which the graph adds to. What other batches of the
        step have left there, run without this graph, stays in the sum."""
        if all(p.grad is view for p, view in zip(self.trained, self.views, strict=True)):
            return
        earlier = [None if p.grad is None else p.grad.clone() for p in self.trained]
        self.sums.zero_()
        for parameter, view, gradient in zip(self.trained, self.views, earlier, strict=True):
            if gradient is not None:
                view.copy_(gradient)
            parameter.grad = view


class _Replay(torch.autograd.Function):
    """`anchor`, any trained parameter, makes autograd come back here; its gradient is summed in the graph."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, anchor: torch.Tensor) -> torch.Tensor:
        ctx.captured, captured.open = captured, weakref.ref(ctx)
        captured.forward.replay()
        return captured.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        ctx.captured.open = lambda: None
        ctx.captured.begin_sum()  # here, not before: gradients may be cleared between the two passes
        ctx.captured.grad.copy_(grads[0])
        ctx.captured.backward.replay()
        return None, None
