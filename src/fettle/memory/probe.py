"""How fast this device is at this model: one real layer and a piece of its head, run and timed.

A layer's seconds are a fixed part (unpacking, launches), a part by token, and attention, which grows with the
documents' square and is timed by itself. Two lengths tell the first two apart. Weights are random: none of
the model's own are needed.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from fettle.adapters.lora import adapt
from fettle.memory.costs import Workload
from fettle.memory.policies import Policy
from fettle.memory.shapes import Shapes
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.packing import row_documents
from fettle.ops.attention import Documents, packed_attention
from fettle.ops.dispatch import best_product_dtype
from fettle.ops.token_log_probs import chunk_tokens, token_log_probs
from fettle.quantization.layers import quantize_linears

LENGTHS = {"cpu": (128, 512), "cuda": (1024, 4096)}
ATTENTION_LENGTH = {"cpu": 2048, "cuda": 8192}
ENOUGH_SECONDS, LONG_SECONDS = 0.3, 3.0

HEAD_ROWS = {"cpu": 65536, "cuda": 32768}
"""Rows of the head that are timed; the rest goes by proportion."""


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = fixed + per_token * tokens."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """Both (tokens, seconds). Neither part is negative: noise may tilt the line too far."""
        (tokens, seconds), (more_tokens, more_seconds) = first, second
        per_token = max(0.0, more_seconds - seconds) / (more_tokens - tokens)
        per_token = min(per_token, more_seconds / more_tokens)
        return cls(more_seconds - per_token * more_tokens, per_token)

    def at(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, slots=True)
class Rates:
    """What the probe measured. layers: forward and backward of one layer without its attention, by policy.
    attention: of one pair of tokens that see each other, all heads, by the length of their document. head: seconds a
    labelled token. products: multiply-adds a second of bare matrix products, times two. update: seconds of the
    optimiser by trained element."""

    layers: dict[Policy, Line]
    attention: dict[int, "PairSeconds"]
    head: float
    products: float
    update: float

    def attention_of(self, tokens: int) -> "PairSeconds":
        """That of the shortest measured document that is as long, or of the longest."""
        return self.attention[min((n for n in self.attention if n >= tokens), default=max(self.attention))]


@dataclass(frozen=True, slots=True)
class PairSeconds:
    """Seconds of attention for one pair of tokens that see each other."""

    forward: float
    backward: float

    def of(self, policy: Policy) -> float:
        """What a layer with this policy spends: attention's forward pass is redone with the whole layer."""
        passes = 2 if policy >= Policy.REDO else 1
        return passes * self.forward + self.backward


def probe(
    config: PreTrainedConfig,
    shapes: Shapes,
    work: Workload,
    device: torch.device,
    note: Callable[[str], object] = lambda part: None,
) -> Rates:
    """Measure. Takes seconds; memory: one layer. note: is told what comes next."""
    model = _one_layer(config, work, device)
    note("attention")
    lengths = (*LENGTHS[device.type], ATTENTION_LENGTH[device.type])
    attention = {tokens: _time_attention(tokens, shapes, work, device) for tokens in lengths}

    def line(policy: Policy) -> Line:
        points = []
        for tokens in LENGTHS[device.type]:
            seconds = _time_layer(model, policy, tokens, work, device)
            pairs = visible_pairs(tokens, shapes.windows[0])
            share = pairs * attention[tokens].of(policy)
            points.append((tokens, max(0.1 * seconds, seconds - share)))
        return Line.through(*points)

    _time_layer(model, Policy.KEEP, LENGTHS[device.type][0], work, device)  # warm-up
    layers: dict[Policy, Line] = {}
    for policy in Policy:
        if policy == Policy.PARK:  # its copies run beside the products
            layers[policy] = layers[Policy.REDO]
            continue
        note(policy.name.lower().replace("_", " "))
        measured = line(policy)
        # A leaner policy does the same and more: where it looks faster, that is noise.
        slower = max([measured, *layers.values()], key=lambda each: each.at(LENGTHS[device.type][1]))
        layers[policy] = slower
    note("the rest")
    return Rates(
        layers=layers,
        attention=attention,
        head=_time_head(shapes, work, device),
        products=_time_products(shapes, work, device),
        update=_time_update(device),
    )


def visible_pairs(tokens: int, window: int | None) -> float:
    """Pairs (query, key) of a causal document, over the last `window` tokens."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * float(window)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The least of up to ten runs that take a third of a second together, but of two at least, or of one that takes
    longer than three seconds, in which noise evens out. The device's queue is emptied before and after."""
    best, began = float("inf"), time.perf_counter()
    for count in range(10):
        enough = LONG_SECONDS if count == 1 else ENOUGH_SECONDS
        if count >= 1 and time.perf_counter() - began > enough:
            break
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _one_layer(config: PreTrainedConfig, work: Workload, device: torch.device) -> DecoderForCausalLM:
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 1, 8, None
    small.eos_token_id = small.bos_token_id = None
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = small.layer_types[:1]
    with torch.device("meta"):
        model = causal_lm_class(config.model_type)(small).to(work.dtype)
    rotary = type(model.model.rotary_emb)(small)
    model.model.rotary_emb = None
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary.to(device)
    for parameter in model.parameters():
        _fill(parameter)
    if work.is_nf4:
        quantize_linears(model)
    targets = "all-linear" if work.targets is None else list(work.targets)
    adapt(model, rank=work.rank, target_modules=targets)
    return model.train()


def _fill(parameter: torch.Tensor) -> None:
    """Small random numbers, one block over and over: making billions of them takes longer than the probe."""
    block = torch.randn(1 << 16, device=parameter.device).mul_(0.02).to(parameter.dtype)
    flat = parameter.data.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])


def _time_layer(
    model: DecoderForCausalLM,
    policy: Policy,
    tokens: int,
    work: Workload,
    device: torch.device,
) -> float:
    x = torch.randn(1, tokens, model.config.hidden_size, device=device).to(work.dtype)
    grad = torch.randn_like(x)
    model.set_policies([policy])
    run = layer_call(model, x.requires_grad_())

    def step() -> None:
        run().backward(grad)

    if device.type == "cuda":
        return seconds_of(_recorded(step), device)
    return seconds_of(step, device)


def layer_call(model: DecoderForCausalLM, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of the first layer alone on x (1, N, E), one document; what it needs is made beforehand."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    cos_sin = model.model.rotary_emb(x, positions, None)
    documents = row_documents(x, None)
    layer = model.model.layers[0]
    return lambda: layer(x, cos_sin=cos_sin, attention_mask=None, documents=documents, past_key_values=None)


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph, as training runs it: launching kernels one by one would be timed instead."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _time_attention(tokens: int, shapes: Shapes, work: Workload, device: torch.device) -> PairSeconds:
    """Measured on one document without a window."""
    size = shapes.query // shapes.heads
    make = (
        (tokens, shapes.heads, size),
        (tokens, shapes.key // size, size),
        (tokens, shapes.key // size, size),
    )
    query, key, value = (torch.randn(s, device=device).to(work.dtype).requires_grad_() for s in make)
    is_start = torch.zeros(tokens, dtype=torch.bool, device=device)
    is_start[0] = True
    documents = Documents.from_starts(is_start)

    def forward() -> torch.Tensor:
        return packed_attention(query, key, value, documents, scale=size**-0.5)

    grad = torch.randn_like(forward())
    forward().backward(grad)
    out = forward()
    pairs = visible_pairs(tokens, None)
    ahead = seconds_of(forward, device)
    behind = seconds_of(
        lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True), device
    )
    return PairSeconds(ahead / pairs, behind / pairs)


def _time_head(shapes: Shapes, work: Workload, device: torch.device) -> float:
    """One chunk of tokens, as many as the whole vocabulary has: how often the weights are read hangs on that."""
    rows = min(HEAD_ROWS[device.type], shapes.vocabulary)
    tokens = min(chunk_tokens(shapes.vocabulary, device.type), LENGTHS[device.type][1])
    weight = torch.empty(rows, shapes.hidden, device=device, dtype=work.dtype)
    # as small as a model's: larger logits make probabilities too small for normal numbers, which take 3 times as long
    _fill(weight)
    hidden = torch.randn(tokens, shapes.hidden, device=device).to(work.dtype).requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def run() -> None:
        token_log_probs(hidden, weight, labels).log_probs.sum().backward()

    run()
    return seconds_of(run, device) / tokens * shapes.vocabulary / rows


def _time_products(shapes: Shapes, work: Workload, device: torch.device) -> float:
    """Operations a second of the layer's largest product, alone."""
    tokens = LENGTHS[device.type][1]
    dtype = best_product_dtype(device.type, work.dtype)
    x = torch.randn(tokens, shapes.hidden, device=device).to(dtype)
    weight = torch.randn(shapes.hidden, shapes.intermediate, device=device).to(dtype)
    x @ weight
    seconds = seconds_of(lambda: x @ weight, device)
    return 2 * tokens * shapes.hidden * shapes.intermediate / seconds


def _time_update(device: torch.device) -> float:
    parameter = nn.Parameter(torch.zeros(1 << 20, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return seconds_of(optimizer.step, device) / parameter.numel()
