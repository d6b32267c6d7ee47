"""The speed of this CPU, measured once on small parts, and the rates of any model computed from it.

A layer's time is a sum of a few terms, each measured separately:

    products     at the speed of a bare matrix product of that width, forward and for the input's gradient
    elements     read and written by norms, gates, sums, conversions and adapters, per token and channel
    weights      dequantized from NF4, or widened, once per use however many tokens there are
    calls        the overhead of Python and PyTorch per layer
    attention    per visible (query, key) pair and channel, by the document's length
    head         its products, and a few passes over its logits

The measurement takes about a second. Each timed part takes a few milliseconds and the shortest of several runs counts,
so that other programs on the same processor disturb it little.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fettle.ops.dispatch import best_product_dtype
from fettle.ops.lora_linear import LowRank, Projection, lora_linears
from fettle.ops.lora_mlp import MLP, lora_mlp
from fettle.ops.nf4 import nf4_dequantize, nf4_quantize
from fettle.ops.rms_norm import rms_norm
from fettle.ops.rotary import apply_rotary
from fettle.ops.token_log_probs import token_log_probs
from fettle.planning.costs import Workload
from fettle.planning.rates import Line, PairSeconds, Rates
from fettle.planning.shapes import Shapes
from fettle.planning.timing import seconds_of, time_attention, time_product, time_update
from fettle.recompute.policies import Policy

WIDTHS = (128, 512, 1536)
"""The smaller sides of the matrices whose products are timed; other matrices use the nearest smaller width."""
LENGTHS = (64, 256, 1024)
"""Document lengths, in tokens, at which attention is timed."""
TOKENS, RANK, HEAD_SIZE = 256, 16, 64
ENOUGH_SECONDS = 0.04
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through a layer without its attention and products.

    call: overhead in seconds per layer. element: seconds per element (`elements_of`).
    """

    call: float
    element: float


@dataclass(frozen=True, slots=True)
class CpuSpeed:
    """What was measured for weights of one dtype.

    products: floating-point operations per second, by width. weight: seconds per weight to convert it to the dtype of
    the products; nf4_weight: the same from NF4. attention: (forward, backward) seconds per visible pair and channel, by
    document length. logit: seconds per logit besides the head's products. update: seconds of AdamW per trained element.
    """

    products: dict[int, float]
    forward: Pass
    backward: Pass
    weight: float
    nf4_weight: float
    attention: dict[int, tuple[float, float]]
    logit: float
    update: float

    def as_figures(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_figures(cls, figures: Mapping[str, Any]) -> "CpuSpeed":
        """Return the inverse of `as_figures`, whose integer keys JSON has turned into text."""
        products = {int(width): speed for width, speed in figures["products"].items()}
        attention = {int(tokens): tuple(pair) for tokens, pair in figures["attention"].items()}
        passes = {name: Pass(**figures[name]) for name in ("forward", "backward")}
        return cls(**{**figures, "products": products, "attention": attention, **passes})

    def product_seconds(self, weights: int, width: int) -> float:
        """Return the seconds of one token times a matrix of `weights` elements whose smaller side is `width`."""
        speed = self.products[max((w for w in self.products if w <= width), default=min(self.products))]
        return 2 * weights / speed

    def rates(self, shapes: Shapes, work: Workload) -> Rates:
        """Return the rates of one model on this CPU."""
        elements = elements_of(shapes.hidden, shapes.intermediate, shapes.query, shapes.key)
        products = {name: self.product_seconds(a * b, min(a, b)) for name, (a, b) in shapes.matrices.items()}
        gate_up = sum(products[name] for name in products if name in ("gate_proj", "up_proj", "gate_up_proj"))
        rank = sum(
            self.product_seconds((a + b) * max(0, work.rank - RANK), RANK)
            for a, b in shapes.matrices.values()
        )
        weight = self.nf4_weight if work.is_nf4 else self.weight
        changed = Line(weight * shapes.layer_weights, 0.0)
        forward = (
            Line(self.forward.call, self.forward.element * elements + sum(products.values()) + rank) + changed
        )
        backward = (
            Line(self.backward.call, self.backward.element * elements + sum(products.values()) + 2 * rank)
            + changed
        )
        keep = forward + backward
        recompute_norms = keep + Line(0.2 * self.forward.call, 0.2 * self.forward.element * elements)
        again = forward + Line(0.0, -products["down_proj"])  # a recomputed layer skips its last product
        layers = {
            Policy.KEEP: keep,
            Policy.RECOMPUTE_NORMS: recompute_norms,
            Policy.RECOMPUTE_MLP: recompute_norms + Line(0.0, gate_up),
            Policy.KEEP_ATTENTION: keep + again,
            Policy.RECOMPUTE: keep + again,
            Policy.OFFLOAD: keep + again,
        }
        pairs = {
            length: PairSeconds(ahead * shapes.query, behind * shapes.query)
            for length, (ahead, behind) in self.attention.items()
        }
        head = 2 * self.product_seconds(shapes.head, shapes.hidden) + self.logit * shapes.vocabulary
        fastest = max(self.products.values())
        return Rates(layers, pairs, head, fastest, self.update)


def elements_of(hidden: int, intermediate: int, query: int, key: int) -> int:
    """Return the elements per token read and written by a layer outside its products, counted once per access."""
    return 6 * hidden + 3 * (query + 2 * key) + 4 * intermediate


def measure(dtype: torch.dtype) -> CpuSpeed:
    """Return the speed of this CPU for weights of `dtype`, measured now; takes about a second."""
    products = {width: time_product(TOKENS, width, 2 * width, dtype, CPU, ENOUGH_SECONDS) for width in WIDTHS}
    one = torch.randn(1024, 1024).to(dtype)
    wide = torch.empty(1024, 1024)
    packed = nf4_quantize(one)
    is_widened = best_product_dtype("cpu", dtype) != dtype
    weight = seconds_of(lambda: wide.copy_(one), CPU, ENOUGH_SECONDS) / one.numel() if is_widened else 0.0
    nf4_weight = seconds_of(lambda: nf4_dequantize(packed), CPU, ENOUGH_SECONDS) / one.numel()
    attention = {}
    for tokens in LENGTHS:
        pair = time_attention(tokens, (4, 4), HEAD_SIZE, dtype, CPU, ENOUGH_SECONDS)
        attention[tokens] = pair.forward / (4 * HEAD_SIZE), pair.backward / (4 * HEAD_SIZE)
    update = time_update(CPU)
    bare = CpuSpeed(products, Pass(0, 0), Pass(0, 0), weight, nf4_weight, attention, 0.0, update)
    forward, backward = _time_passes(bare, dtype)
    logit = _time_logit(bare, dtype)
    return replace(bare, forward=forward, backward=backward, logit=logit)


def _time_passes(bare: CpuSpeed, dtype: torch.dtype) -> tuple[Pass, Pass]:
    """Time a tiny layer for the call overhead, and one of a common shape for its elements."""
    common = _Layer(512, 1408, dtype)
    calls, seconds = _Layer(64, 128, dtype).time(16), common.time(TOKENS)
    known = common.known_seconds(bare)
    forward, backward = (
        Pass(call, max(0.0, found - call - known) / (TOKENS * common.elements))
        for call, found in zip(calls, seconds, strict=True)
    )
    return forward, backward


class _Layer:
    """A decoder layer without attention, built from the ops that models use, with random weights."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.elements = elements_of(hidden, intermediate, hidden, hidden)
        self.norm = torch.ones(hidden, dtype=dtype)
        make = functools.partial(_projection, dtype=dtype)
        self.qkv = [make(hidden, hidden) for _ in range(3)]
        self.output = make(hidden, hidden)
        gate, up, down = make(intermediate, hidden), make(intermediate, hidden), make(hidden, intermediate)
        self.mlp = MLP((gate, up), down, "silu")
        self.shapes = [each.weight.shape for each in (*self.qkv, self.output, gate, up, down)]

    def known_seconds(self, bare: CpuSpeed) -> float:
        """Return the seconds of its products in one pass over TOKENS tokens, and of widening its weights."""
        products = sum(bare.product_seconds(a * b, min(a, b)) for a, b in self.shapes)
        return TOKENS * products + bare.weight * sum(a * b for a, b in self.shapes)

    def time(self, tokens: int) -> tuple[float, float]:
        """Return the seconds of the forward and of the backward pass."""
        x = torch.randn(1, tokens, self.hidden).to(self.dtype).requires_grad_()
        cos = torch.ones(1, tokens, HEAD_SIZE, dtype=self.dtype)
        run = functools.partial(self._run, x, cos, torch.zeros_like(cos))
        total = (run() * torch.randn_like(x)).sum()
        total.backward(retain_graph=True)  # warm-up: allocations of the first call
        return (
            seconds_of(run, CPU, 2 * ENOUGH_SECONDS),
            seconds_of(lambda: total.backward(retain_graph=True), CPU, 2 * ENOUGH_SECONDS),
        )

    def _run(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = (1, x.shape[1], -1, HEAD_SIZE)
        query, key, value = (
            each.view(heads).transpose(1, 2) for each in lora_linears(rms_norm(x, self.norm, 1e-5), self.qkv)
        )
        mixed = apply_rotary(query, cos, sin) + apply_rotary(key, cos, sin) + value  # in place of attention
        x = x + lora_linears(mixed.transpose(1, 2).reshape(x.shape), [self.output])[0]
        return x + lora_mlp(rms_norm(x, self.norm, 1e-5), self.mlp)


def _projection(outputs: int, inputs: int, *, dtype: torch.dtype) -> Projection:
    a, b = (torch.randn(shape).mul_(0.02).requires_grad_() for shape in ((RANK, inputs), (outputs, RANK)))
    return Projection(torch.randn(outputs, inputs).mul_(0.02).to(dtype), LowRank(a, b, 1.0))


def _time_logit(bare: CpuSpeed, dtype: torch.dtype) -> float:
    """Return seconds per logit, from a head so narrow that the passes over the logits dominate."""
    tokens, hidden, vocabulary = 64, 64, 16384
    weight = torch.randn(vocabulary, hidden).mul_(0.02).to(dtype)
    states = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.long)
    seconds = seconds_of(lambda: token_log_probs(states, weight, labels), CPU, ENOUGH_SECONDS)
    products = 2 * tokens * bare.product_seconds(vocabulary * hidden, hidden)
    return max(0.0, seconds - products) / (tokens * vocabulary)
