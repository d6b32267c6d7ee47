"""Run scheduled tokens through the decoder: prompts in one packed row, or one new token of every running sequence.

On a GPU a decode step is a CUDA graph, captured per batch size and page-table width, both rounded up: launching a
layer's kernels from Python takes longer than reading its weights.

Shapes: S sequences, T tokens in this step, W pages per sequence, V tokens in the vocabulary.
"""

from collections.abc import Hashable, Sequence
from itertools import chain

import numpy as np
import torch

from fettle.adapters.mixed import MixedAdapters, ModelAdapters, mixed_adapters
from fettle.engine.pages import PAGE_SIZE
from fettle.engine.scheduler import Chunk, Running
from fettle.models.attention_context import PagedTokens
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.families import head_dim_of
from fettle.ops import Documents

SMALLEST_WIDTH = 32
"""Pages per sequence that a graph covers at least: 512 tokens."""

COLUMNS = 5
"""Numbers per sequence that a decode step reads besides its pages."""

ALIGNED = 4
"""Numbers of 4 bytes: kernels are compiled anew for tensors that do not begin at a multiple of 16 bytes."""

Cache = list[tuple[torch.Tensor, torch.Tensor]]


def cache_bytes_per_token(model: DecoderForCausalLM) -> int:
    """Return the bytes that one token takes in the keys and values of all layers."""
    config = model.config
    item = _dtype_of(model).itemsize
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config) * item)


def make_cache(model: DecoderForCausalLM, pages: int) -> Cache:
    """Return keys and values per layer, each (pages, PAGE_SIZE, K, D), uninitialized."""
    config = model.config
    shape = (pages, PAGE_SIZE, config.num_key_value_heads, head_dim_of(config))
    return [
        (
            torch.empty(shape, dtype=_dtype_of(model), device=model.device),
            torch.empty(shape, dtype=_dtype_of(model), device=model.device),
        )
        for _ in range(config.num_hidden_layers)
    ]


def _dtype_of(model: DecoderForCausalLM) -> torch.dtype:
    """Return the dtype of the hidden states; `model.dtype` may be that of an adapter."""
    return model.model.norm.weight.dtype


class Runner:
    """Computes hidden states and logits for one model, with its adapters, and one cache."""

    def __init__(self, model: DecoderForCausalLM, cache: Cache, adapters: ModelAdapters) -> None:
        self.model, self.cache, self.adapters = model, cache, adapters
        self.device = model.device
        self.graphs: dict[Hashable, _Graph] = {}

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute the chunks; return the decoder's output at every token, (T, E)."""
        sequences = [chunk.sequence for chunk in chunks]
        tensors = self._tensors(*_prefill_inputs(chunks))
        ids, positions, whole, slots, starts, lengths, adapters, bounds, ends, table = tensors
        longest = max(chunk.end - chunk.begin for chunk in chunks)
        is_fresh = all(chunk.begin == 0 for chunk in chunks)
        context = PagedTokens(
            rotation=self._rotation(positions, whole),
            cache=self.cache,
            slots=slots,
            page_table=table,
            lengths=ends,
            bounds=bounds,
            documents=Documents(lengths, starts, bounds, longest) if is_fresh else None,
        )
        mixed = MixedAdapters(self.adapters.names, adapters) if _is_mixed(sequences) else None
        decoder = self.model.model
        x = decoder.embed(ids[None], None)
        with mixed_adapters(mixed):
            return decoder.norm(decoder.run_layers(x, context))[0]

    def decode(self, sequences: Sequence[Running], newest: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the newest token of each sequence; return the logits after it, fp32 (S, V).

        newest: those tokens, (S,) on the device, if they have not been added to the sequences yet.
        """
        width, is_mixed = max(len(sequence.pages) for sequence in sequences), _is_mixed(sequences)
        if self.device.type == "cuda":
            size, width = _rounded(len(sequences)), max(SMALLEST_WIDTH, 1 << (width - 1).bit_length())
            kind = size, width, is_mixed, self.adapters.identity()
            if kind not in self.graphs:
                self.graphs[kind] = _Graph(self, size, width, is_mixed)
            values = _decode_inputs(sequences, size, width, 0 if newest is None else 1)
            return self.graphs[kind].run(values, newest)[: len(sequences)]
        inputs = torch.from_numpy(_decode_inputs(sequences, len(sequences), width))
        return self.decode_logits(inputs, self._embed(inputs, len(sequences)), is_mixed)

    def decode_logits(self, inputs: torch.Tensor, x: torch.Tensor, is_mixed: bool) -> torch.Tensor:
        """Return the logits after x (1, S, E). inputs: see `_decode_inputs`, on the device."""
        size = x.shape[1]
        _, positions, lengths, slots, adapters = inputs[: COLUMNS * size].view(COLUMNS, size)
        context = PagedTokens(
            rotation=self._rotation(positions, lengths),
            cache=self.cache,
            slots=slots,
            page_table=inputs[COLUMNS * size :].view(size, -1),
            lengths=lengths,
        )
        decoder = self.model.model
        with mixed_adapters(MixedAdapters(self.adapters.names, adapters) if is_mixed else None):
            x = decoder.run_layers(x, context)
        return self.model.logits(decoder.norm(x)[0]).float()

    def _embed(self, inputs: torch.Tensor, size: int) -> torch.Tensor:
        return self.model.model.embed(inputs[None, :size], None)

    def _rotation(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(0, dtype=_dtype_of(self.model), device=self.device)
        return self.model.model.rotary_emb(like, positions[None], lengths[None])

    def _tensors(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Return the arrays on the device, as int32; one copy takes all of them there."""
        places = np.cumsum([0, *(-(-array.size // ALIGNED) * ALIGNED for array in arrays)])
        joined = np.empty(places[-1], dtype=np.int32)
        for place, array in zip(places, arrays, strict=False):
            joined[place : place + array.size] = array.ravel()
        whole = torch.from_numpy(joined).to(self.device)
        return [
            whole[place : place + array.size].view(array.shape)
            for place, array in zip(places, arrays, strict=False)
        ]


def _prefill_inputs(chunks: Sequence[Chunk]) -> tuple[np.ndarray, ...]:
    """Return what a prefill reads.

    Of each token, (T,): its id, its position, its sequence's length, its slot, where its chunk starts in this row, the
    chunk's length, its adapter. Then where each chunk begins, (S + 1,), the position after its last token, (S,), and
    the page table, (S, W).
    """
    sequences = [chunk.sequence for chunk in chunks]
    ids = np.fromiter(chain.from_iterable(c.sequence.tokens[c.begin : c.end] for c in chunks), dtype=np.int32)
    sizes = np.array([chunk.end - chunk.begin for chunk in chunks])
    ends = np.array([chunk.end for chunk in chunks])
    bounds = np.concatenate(([0], sizes.cumsum()))
    starts, lengths = np.repeat(bounds[:-1], sizes), np.repeat(sizes, sizes)
    positions = np.arange(len(ids)) - starts + np.repeat(ends - sizes, sizes)
    table = _page_table(sequences, max(len(sequence.pages) for sequence in sequences))
    owner = np.repeat(np.arange(len(chunks)), sizes)
    slots = table[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    whole = np.array([len(sequence.tokens) for sequence in sequences])[owner]
    adapters = np.array([sequence.adapter for sequence in sequences])[owner]
    return ids, positions, whole, slots, starts, lengths, adapters, bounds, ends, table


def _decode_inputs(sequences: Sequence[Running], size: int, width: int, ahead: int = 0) -> np.ndarray:
    """Return what a decode step reads, as one int32 array, so that one copy takes it to the device.

    The newest tokens, their positions, the sequences' lengths, the tokens' slots and the sequences' adapters, each
    (S,); then the page table, (S, W). Rows beyond the sequences are padding: length 0, slot -1. ahead: 1 if the newest
    token of each sequence is still to be added to it; its place in the array is then to be filled.
    """
    values = np.zeros(size * (COLUMNS + width), dtype=np.int32)
    columns, count = values[: COLUMNS * size].reshape(COLUMNS, size), len(sequences)
    last = np.array([len(sequence.tokens) for sequence in sequences]) - 1 + ahead
    columns[0, :count] = [sequence.tokens[-1] for sequence in sequences]
    columns[1, :count] = last
    columns[2, :count] = last + 1
    pages = np.array([sequence.pages[-1] for sequence in sequences])
    columns[3, :count] = pages * PAGE_SIZE + last % PAGE_SIZE
    columns[3, count:] = -1
    columns[4, :count] = [sequence.adapter for sequence in sequences]
    values[COLUMNS * size :].reshape(size, width)[:count] = _page_table(sequences, width)
    return values


def _is_mixed(sequences: Sequence[Running]) -> bool:
    return any(sequence.request.adapter is not None for sequence in sequences)


def _page_table(sequences: Sequence[Running], width: int) -> np.ndarray:
    counts = np.array([len(sequence.pages) for sequence in sequences])
    pages = np.fromiter(chain.from_iterable(sequence.pages for sequence in sequences), np.int32, counts.sum())
    table = np.zeros((len(sequences), width), dtype=np.int32)
    table[np.arange(width) < counts[:, None]] = pages
    return table


def _rounded(sequences: int) -> int:
    """Return the batch size of the graph for that many sequences: a power of two up to 16, then a multiple of 16."""
    if sequences <= 16:
        return 1 << (sequences - 1).bit_length()
    return -(-sequences // 16) * 16


class _Graph:
    """A decode step of fixed size as a CUDA graph. Its inputs are copied to where it reads them."""

    def __init__(self, runner: Runner, size: int, width: int, is_mixed: bool) -> None:
        self.runner, self.size = runner, size
        shape = size * (COLUMNS + width)
        self.staged = [torch.zeros(shape, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        """Used in turn: the copy of one may still wait for the previous step when the next is filled."""
        self.inputs = torch.zeros(shape, dtype=torch.int32, device=runner.device)
        self.inputs[3 * size : 4 * size] = -1  # padding: the passes below write nothing to the cache
        self.x = runner._embed(self.inputs, size).clone()
        self.graph = torch.cuda.CUDAGraph()
        for _ in range(2):  # compiles kernels and allocates workspaces, which a capture cannot
            runner.decode_logits(self.inputs, self.x, is_mixed)
        torch.cuda.synchronize(runner.device)
        pool = next((each.graph.pool() for each in runner.graphs.values()), None)
        with torch.cuda.graph(self.graph, pool=pool):
            self.logits = runner.decode_logits(self.inputs, self.x, is_mixed)

    def run(self, inputs: np.ndarray, newest: torch.Tensor | None) -> torch.Tensor:
        """Return the logits, fp32 (S, V); the next run of any graph overwrites them."""
        self.staged.reverse()
        self.staged[0].numpy()[:] = inputs
        self.inputs.copy_(self.staged[0], non_blocking=True)
        if newest is not None:
            self.inputs[: len(newest)].copy_(newest)
        self.x.copy_(self.runner._embed(self.inputs, self.size))
        self.graph.replay()
        return self.logits
