"""Forward and backward passes of all layers as CUDA graphs, replayed in every step.

For a small model, launching kernels from Python takes longer than running them; a graph launches all of its kernels at
once. Its shapes are fixed, so there are graphs of several lengths, and rows are padded to the next one with an extra
document of padding. Its addresses are fixed too, so inputs are copied into static buffers, and the adapters' gradients
are accumulated inside the graph.

Graphs of one kind share their inputs and their memory, as only one of them runs at a time; the longest is captured
first, so that the others fit into what it needs. Passes without gradient, such as those of the reference model in
preference training, run between forward and backward, so they have graphs, inputs and memory of their own, a set of
graphs per state of the adapters.

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

RATIO, LENGTHS = 0.75, 8
"""Each graph's length as a share of the next longer one's, and how many there are: down to 13% of the longest."""


class LayerGraphs:
    """The graphs of one model for rows of up to `tokens` tokens, each captured when it is first needed.

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
        self.lengths = sorted({round(tokens * RATIO**n) for n in range(LENGTHS)} - {0})
        self.trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.calls: Counter[Hashable] = Counter()
        self.captured: dict[int, _Captured] = {}
        """By length."""
        self.without_gradient: dict[Hashable, dict[int, _Forward]] = {}
        """By the state of the adapters, and by length."""
        self.static: dict[bool, _Static] = {}
        """Of passes with gradient and of those without, as the former's inputs are read again in backward."""
        self.open: Callable[[], Any] = lambda: None
        """Returns the autograd context of a forward pass whose backward has not run yet, if it is still alive."""

    def serves(self, x: torch.Tensor) -> bool:
        """Whether to run x (B, N, E) as a graph.

        Not in the first call, which warms up what is compiled on first use. Nor between the forward and backward pass
        of an earlier run: the graphs' memory still holds the activations that its backward needs.
        """
        if x.shape[0] * x.shape[1] > self.tokens:
            return False
        has_gradient = torch.is_grad_enabled()
        kind = has_gradient or self.state()
        self.calls[kind] += 1
        is_free = not has_gradient or self.open() is None
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
        if (has_gradient := torch.is_grad_enabled()) not in self.static:
            self.static[has_gradient] = _Static(self.tokens, rows, flat, self.trained if has_gradient else [])
        graph: _Captured | _Forward
        if has_gradient:
            graph = self._graph(self.captured, _Captured, rows, flat)
        else:
            graph = self._graph(self.without_gradient.setdefault(self.state(), {}), _Forward, rows, flat)
        graph.take(rows, flat)
        # x needs no gradient, so a trained parameter ties the output to autograd
        output = _Replay.apply(graph, self.trained[0]) if isinstance(graph, _Captured) else graph.replay()
        return output[:, : rows.shape[1]].view_as(x)

    def _graph(
        self, found: dict[int, Any], make: Callable[..., Any], rows: torch.Tensor, context: PackedDocuments
    ) -> Any:
        """Return the graph for this pass; captures it if there is none, or only one for fewer documents."""
        length = next(each for each in self.lengths if each >= rows.shape[1])
        bounds = len(context.documents.bounds) + 1  # one more for the padding
        # Bounds are rounded up to a power of two, so that a few captures serve every number of documents.
        size = 1 << (bounds - 1).bit_length()
        needs_prefixes = context.documents.prefixes is not None
        for each in (self.tokens, length) if not found else (length,):
            old = found.get(each)
            if old is None or len(old.documents.bounds) < bounds or (needs_prefixes and not old.has_prefixes):
                del old
                found.pop(each, None)  # free its memory before capturing the next
                pool = next((other.pool for other in found.values()), None)
                found[each] = make(self, each, size, needs_prefixes, pool)
        return found[length]


def active_adapters(layers: nn.Module) -> Callable[[], Hashable]:
    """Return a function that identifies the active adapters. PEFT switches those of all layers together, so one
    adapted layer tells."""
    adapted: Any = next((each for each in layers.modules() if hasattr(each, "disable_adapters")), None)
    return lambda: None if adapted is None else (adapted.disable_adapters, tuple(adapted.active_adapters))


class _Static:
    """What all graphs of a kind read and write at the same place: the longest inputs and outputs, and, for passes with
    gradient, the adapters' gradients.

    sums: the gradients of all trained parameters, flat, fp32; views: the same memory in the parameters' shapes. The
    backward graphs add to them, so they must be the parameters' `grad` when one is captured and when it is replayed.
    """

    def __init__(
        self, tokens: int, x: torch.Tensor, context: PackedDocuments, trained: list[nn.Parameter]
    ) -> None:
        device, written = x.device, tokens if trained else 0
        self.x, self.output, self.grad = (x.new_zeros(1, n, x.shape[-1]) for n in (tokens, written, written))
        self.rotation = [each.new_zeros(1, tokens, each.shape[-1]) for each in context.rotation]
        self.starts, self.roots, self.ends = torch.zeros(3, tokens, dtype=torch.int32, device=device)
        self.trained = trained
        self.sums = torch.zeros(sum(p.numel() for p in trained), device=device)
        sizes = [parameter.numel() for parameter in trained]
        self.views = [part.view_as(p) for part, p in zip(self.sums.split(sizes), trained, strict=True)]

    def begin_sum(self) -> None:
        """Make the parameters' gradients views of `sums`, to which the graphs add.

        Gradients of the same step's earlier batches that ran without a graph are copied into the sum.
        """
        if all(p.grad is view for p, view in zip(self.trained, self.views, strict=True)):
            return
        earlier = [None if p.grad is None else p.grad.clone() for p in self.trained]
        self.sums.zero_()
        for parameter, view, gradient in zip(self.trained, self.views, earlier, strict=True):
            if gradient is not None:
                view.copy_(gradient)
            parameter.grad = view


class _LayerGraph:
    """A graph's inputs: always at the same place, always of the same shape."""

    pool: Any

    def __init__(self, owner: LayerGraphs, length: int, bounds: int, has_prefixes: bool) -> None:
        static = owner.static[torch.is_grad_enabled()]
        self.owner, self.static, self.length, self.has_prefixes = owner, static, length, has_prefixes
        self.x = static.x[:, :length]
        starts = static.starts[:length]
        documents = Documents(
            lengths=torch.empty(0, device=starts.device),
            starts=starts,
            bounds=starts.new_full((bounds,), length),
            longest=length,
        )
        documents.bounds[0] = 0
        if has_prefixes:
            # one more group for the padding; bounds of a group in pairs, and two for the ends
            queries = starts.new_full((2 * bounds + 2,), length)
            queries[0] = 0
            shared = static.roots[:length], static.ends[:length]
            prefixes = Prefixes(*shared, queries, queries.clone(), length, length)
            documents = replace(documents, prefixes=prefixes)
        self.documents = documents
        cos, sin = (each[:, :length] for each in static.rotation)
        self.context = PackedDocuments((cos, sin), documents)
        for each in (static.starts, static.roots, static.ends):  # valid for the passes of a capture
            each.zero_()

    def take(self, x: torch.Tensor, context: PackedDocuments) -> None:
        """Copy the inputs in; what is beyond them is padding, a document of its own."""
        length, documents = x.shape[1], context.documents
        for static, given in zip((self.x, *self.context.rotation), (x, *context.rotation), strict=True):
            static[:, :length].copy_(given)
            static[:, length:].zero_()
        starts, bounds = self.documents.starts, self.documents.bounds
        starts[:length].copy_(documents.starts)
        starts[length:].fill_(length)
        bounds[: len(documents.bounds)].copy_(documents.bounds)
        bounds[len(documents.bounds) :].fill_(self.length)
        if self.documents.prefixes is not None:
            self._take_prefixes(self.documents.prefixes, documents, length)

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
            target[count:].fill_(self.length)
        prefixes.key_bounds[count : count + 2].fill_(length)  # the padding attends to nothing before it


class _Forward(_LayerGraph):
    """The graph of a pass without gradient. pool: the memory of the others of its kind."""

    def __init__(self, *args: Any) -> None:
        *inputs, pool = args
        super().__init__(*inputs)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, pool=pool), torch.no_grad():
            self.output = self.owner.layers(self.x, self.context)
        self.pool = self.graph.pool()

    def replay(self) -> torch.Tensor:
        self.graph.replay()
        return self.output.clone()


class _Captured(_LayerGraph):
    """The graphs of a forward and a backward pass. pool: the memory of the others of its kind."""

    def __init__(self, *args: Any) -> None:
        *inputs, pool = args
        super().__init__(*inputs)
        static = self.static
        self.output, self.grad = static.output[:, : self.length], static.grad[:, : self.length]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool), torch.enable_grad():
            output = self.owner.layers(self.x, self.context)
            self.output.copy_(output.detach())
        self.pool = self.forward.pool()
        before = [parameter.grad for parameter in static.trained]
        for parameter, view in zip(static.trained, static.views, strict=True):
            parameter.grad = view
        with torch.cuda.graph(self.backward, pool=self.pool):
            # accumulates each gradient into its view and frees it; torch.autograd.grad would hold all of them at once
            torch.autograd.backward(output, self.grad, inputs=static.trained)
        for parameter, gradient in zip(static.trained, before, strict=True):
            parameter.grad = gradient


class _Replay(torch.autograd.Function):
    """Replays the graphs. `anchor`, any trained parameter, makes autograd call backward here; all parameter gradients
    are accumulated by the graph itself, so none is returned."""

    @staticmethod
    def forward(ctx: Any, captured: _Captured, anchor: torch.Tensor) -> torch.Tensor:
        ctx.captured, captured.owner.open = captured, weakref.ref(ctx)
        captured.forward.replay()
        return captured.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        ctx.captured.owner.open = lambda: None
        ctx.captured.static.begin_sum()  # not before: the caller may clear gradients between the two passes
        ctx.captured.grad.copy_(grads[0])
        ctx.captured.backward.replay()
        return None, None
