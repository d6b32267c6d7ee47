"""Forward and backward passes of all layers as two CUDA graphs, replayed in every step.

For a small model, launching kernels from Python takes longer than running them; a graph launches all of its kernels at
once. Its shapes are fixed, so rows are padded to one length with an extra document of padding. Its addresses are fixed
too, so inputs are copied into static buffers, and the adapters' gradients are accumulated inside the graph.

Passes without gradient, such as those of the reference model in preference training, have a separate graph per state
of the adapters. It shares no memory pool with the other two, as it runs between forward and backward.

Shapes: B batch, N tokens per row, E hidden size, T = B * N tokens in all, padded to the graph's length.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fettle.models.attention_context import PackedDocuments
from fettle.ops import Documents
from fettle.ops.shared_prefix import Prefixes

Layers = Callable[..., torch.Tensor]

SHORTEST = 0.6
"""Rows shorter than this share of the graph's length run without it: padding would cost more than launches."""


class LayerGraphs:
    """The graphs of one model for rows of up to `tokens` tokens; captured on the first `run`.

    layers: runs all layers, (x, context) -> x. It must run the same kernels in every call, without dropout,
    as long as `state` returns the same value.
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
        """Whether to run x (B, N, E) as a graph.

        Not in the first call, which warms up what is compiled on first use. Nor between the forward and backward pass
        of an earlier run: the graph's memory still holds the activations that its backward needs.
        """
        if not SHORTEST * self.tokens <= x.shape[0] * x.shape[1] <= self.tokens:
            return False
        has_gradient = torch.is_grad_enabled()
        kind = has_gradient or self.state()
        self.calls[kind] += 1
        is_free = not has_gradient or self.captured is None or self.captured.open() is None
        return is_free and self.calls[kind] > 1 and not x.requires_grad

    def run(self, x: torch.Tensor, context: PackedDocuments) -> torch.Tensor:
        """Return what the layers return for x (B, N, E); gradients go to the trained parameters alone.

        context: the documents of all rows concatenated, as the graph has a single row.
        """
        rows = x.reshape(1, -1, x.shape[-1])
        cos, sin = (
            each.expand(x.shape[0], -1, -1).reshape(1, -1, each.shape[-1]) for each in context.rotation
        )
        flat = PackedDocuments((cos, sin), context.documents)
        graph = self._graph(rows, flat)
        graph.take(rows, flat)
        if isinstance(graph, _Captured):
            # x needs no gradient, so a trained parameter ties the output to autograd
            output: torch.Tensor = _Replay.apply(graph, self.trained[0])
        else:
            output = graph.replay()
        return output[:, : rows.shape[1]].view_as(x)

    def _graph(self, rows: torch.Tensor, context: PackedDocuments) -> "_Captured | _Forward":
        """Return the graph for this pass; captures it if there is none, or only one for fewer documents."""
        bounds = len(context.documents.bounds) + 1  # one more for the padding
        # Bounds are rounded up to a power of two, so that a few captures serve every number of documents.
        size, state = 1 << (bounds - 1).bit_length(), self.state()

        def serves(found: "_Inputs | None") -> bool:
            if found is None or len(found.context.documents.bounds) < bounds:
                return False
            return context.documents.prefixes is None or found.context.documents.prefixes is not None

        if torch.is_grad_enabled():
            if not serves(self.captured):
                self.captured = None  # free its memory before capturing the next
                self.captured = _Captured(self, rows, context, size)
            assert self.captured is not None
            return self.captured
        found = self.without_gradient.pop(state, None)
        if found is None or not serves(found):
            found = None
            found = _Forward(self, rows, context, size)
        self.without_gradient[state] = found
        return found


def active_adapters(layers: nn.Module) -> Callable[[], Hashable]:
    """Return a function that identifies the active adapters. PEFT switches those of all layers together, so one
    adapted layer tells."""
    adapted: Any = next((each for each in layers.modules() if hasattr(each, "disable_adapters")), None)
    return lambda: None if adapted is None else (adapted.disable_adapters, tuple(adapted.active_adapters))


class _Inputs:
    """What a graph reads: always at the same place, always of the same shape."""

    def __init__(self, tokens: int, x: torch.Tensor, context: PackedDocuments, bounds: int) -> None:
        device = x.device
        self.x = x.new_zeros(1, tokens, x.shape[-1])
        cos, sin = (each.new_zeros(1, tokens, each.shape[-1]) for each in context.rotation)
        documents = Documents(
            lengths=torch.empty(0, device=device),
            starts=torch.zeros(tokens, dtype=torch.int32, device=device),
            bounds=torch.full((bounds,), tokens, dtype=torch.int32, device=device),
            longest=tokens,
        )
        documents.bounds[0] = 0
        if context.documents.prefixes is not None:
            # one more group for the padding; bounds of a group in pairs, and two for the ends
            each, pairs = documents.starts, documents.bounds.new_full((2 * bounds + 2,), tokens)
            parts = (each.clone(), each.clone(), pairs.clone(), pairs.clone())
            documents = replace(documents, prefixes=Prefixes(*parts, tokens, tokens))
        self.context = PackedDocuments((cos, sin), documents)

    def take(self, x: torch.Tensor, context: PackedDocuments) -> None:
        """Copy the inputs in; what is beyond them is padding, a document of its own."""
        length, documents = x.shape[1], context.documents
        for static, given in zip((self.x, *self.context.rotation), (x, *context.rotation), strict=True):
            static[:, :length].copy_(given)
            static[:, length:].zero_()
        starts, bounds = self.context.documents.starts, self.context.documents.bounds
        starts[:length].copy_(documents.starts)
        starts[length:].fill_(length)
        bounds[: len(documents.bounds)].copy_(documents.bounds)
        bounds[len(documents.bounds) :].fill_(self.x.shape[1])
        if self.context.documents.prefixes is not None:
            self._take_prefixes(self.context.documents.prefixes, documents, length)

    def _take_prefixes(self, prefixes: Prefixes, documents: Documents, length: int) -> None:
        given = documents.prefixes or Prefixes.of(documents.bounds, torch.zeros_like(documents.bounds[1:]))
        for target, source in ((prefixes.roots, given.roots), (prefixes.ends, given.ends)):
            target[:length].copy_(source)
            target[length:].fill_(length)
        count = len(given.query_bounds) - 1
        for target, source in (
            (prefixes.query_bounds, given.query_bounds),
            (prefixes.key_bounds, given.key_bounds),
        ):
            target[:count].copy_(source[:count])
            target[count:].fill_(self.x.shape[1])
        prefixes.key_bounds[count : count + 2].fill_(length)  # the padding attends to nothing before it


class _Forward(_Inputs):
    """The graph of a pass without gradient."""

    def __init__(self, owner: LayerGraphs, x: torch.Tensor, context: PackedDocuments, bounds: int) -> None:
        super().__init__(owner.tokens, x, context, bounds)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(x.device)
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.output = owner.layers(self.x, self.context)

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.output.clone()


class _Captured(_Inputs):
    """The graphs of a forward and a backward pass, which share one memory pool.

    sums: the gradients of all trained parameters, flat, fp32; views: the same memory in the parameters' shapes. The
    backward graph adds to them, so they must be the parameters' `grad` when it is captured and when it is replayed.
    """

    def __init__(self, owner: LayerGraphs, x: torch.Tensor, context: PackedDocuments, bounds: int) -> None:
        super().__init__(owner.tokens, x, context, bounds)
        device = x.device
        self.open: Callable[[], Any] = lambda: None
        """Returns the autograd context of a forward pass whose backward has not run yet, if it is still alive."""
        self.trained = owner.trained
        self.sums = torch.zeros(sum(p.numel() for p in self.trained), device=device)
        sizes = [parameter.numel() for parameter in self.trained]
        self.views = [part.view_as(p) for part, p in zip(self.sums.split(sizes), self.trained, strict=True)]
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward), torch.enable_grad():
            self.output = owner.layers(self.x, self.context)
        self.grad = torch.zeros_like(self.output)
        before = [parameter.grad for parameter in self.trained]
        for parameter, view in zip(self.trained, self.views, strict=True):
            parameter.grad = view
        with torch.cuda.graph(self.backward, pool=self.forward.pool()):
            # accumulates each gradient into its view and frees it; torch.autograd.grad would hold all of them at once
            torch.autograd.backward(self.output, self.grad, inputs=self.trained)
        for parameter, gradient in zip(self.trained, before, strict=True):
            parameter.grad = gradient
        self.output = self.output.detach()

    def begin_sum(self) -> None:
        """Make the parameters' gradients views of `sums`, to which the graph adds.

        Gradients of the same step's earlier batches that ran without this graph are copied into the sum.
        """
        if all(p.grad is view for p, view in zip(self.trained, self.views, strict=True)):
            return
        earlier = [None if p.grad is None else p.grad.clone() for p in self.trained]
        self.sums.zero_()
        for parameter, view, gradient in zip(self.trained, self.views, earlier, strict=True):
            if gradient is not None:
                view.copy_(gradient)
            parameter.grad = view


class _Replay(torch.autograd.Function):
    """Replays the graphs. `anchor`, any trained parameter, makes autograd call backward here; all parameter gradients
    are accumulated by the graph itself, so none is returned."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, anchor: torch.Tensor) -> torch.Tensor:
        ctx.captured, captured.open = captured, weakref.ref(ctx)
        captured.forward.replay()
        return captured.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        ctx.captured.open = lambda: None
        ctx.captured.begin_sum()  # not before: the caller may clear gradients between the two passes
        ctx.captured.grad.copy_(grads[0])
        ctx.captured.backward.replay()
        return None, None
