"""The speed of this device for this model: one real layer and a slice of its head, run and timed.

A layer's time has a fixed part (dequantization, kernel launches), a part per token, and attention, which grows with the
square of the document's length and is timed separately. Timing two lengths separates the first two. Weights are random:
the checkpoint is not read.
"""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from fettle.adapters.lora import adapt
from fettle.models.attention_context import PackedDocuments
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.ops.token_log_probs import chunk_tokens, token_log_probs
from fettle.planning.costs import Workload
from fettle.planning.rates import Line, PairSeconds, Rates, visible_pairs
from fettle.planning.shapes import Shapes
from fettle.planning.timing import seconds_of, time_attention, time_product, time_update
from fettle.quantization.layers import quantize_linears
from fettle.recompute.policies import Policy

LENGTHS = {"cpu": (128, 512), "cuda": (1024, 4096)}
ATTENTION_LENGTH = {"cpu": 2048, "cuda": 8192}
HEAD_ROWS = {"cpu": 65536, "cuda": 32768}
"""Vocabulary rows of the head that are timed; the time is scaled up to the full vocabulary."""


def probe(
    config: PreTrainedConfig,
    shapes: Shapes,
    work: Workload,
    device: torch.device,
) -> Rates:
    """Return the rates of the model, measured now; takes seconds, and the memory of one layer."""
    model = _one_layer(config, work, device)
    lengths = (*LENGTHS[device.type], ATTENTION_LENGTH[device.type])
    attention = {tokens: _attention(tokens, shapes, work, device) for tokens in lengths}

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
        if policy == Policy.OFFLOAD:  # its copies overlap with the products
            layers[policy] = layers[Policy.RECOMPUTE]
            continue
        measured = line(policy)
        # A policy that keeps less does strictly more work: if it measures faster, that is noise.
        slower = max([measured, *layers.values()], key=lambda each: each.at(LENGTHS[device.type][1]))
        layers[policy] = slower
    return Rates(
        layers=layers,
        attention=attention,
        head=_time_head(shapes, work, device),
        products=time_product(
            LENGTHS[device.type][1], shapes.hidden, shapes.intermediate, work.dtype, device
        ),
        update=time_update(device),
    )


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
    """Fill with small random numbers, repeating one block: generating billions would take longer than the probe."""
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
    """Return a function that runs only the first layer on x (1, N, E), one document; its inputs are made beforehand."""
    context = PackedDocuments.of_rows(model.model.rotary_emb, x)
    layer = model.model.layers[0]
    return lambda: layer(x, context)


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Return `step` as a CUDA graph, as training runs it: otherwise kernel launches would dominate the time."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _time_head(shapes: Shapes, work: Workload, device: torch.device) -> float:
    """Return the seconds per token.

    Times one chunk of as many tokens as with the full vocabulary, which determines how often the weights are read.
    """
    rows = min(HEAD_ROWS[device.type], shapes.vocabulary)
    tokens = min(chunk_tokens(shapes.vocabulary, device.type), LENGTHS[device.type][1])
    weight = torch.empty(rows, shapes.hidden, device=device, dtype=work.dtype)
    # as small as a model's: larger logits make subnormal probabilities, which take 3 times as long
    _fill(weight)
    hidden = torch.randn(tokens, shapes.hidden, device=device).to(work.dtype).requires_grad_()
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def run() -> None:
        token_log_probs(hidden, weight, labels).log_probs.sum().backward()

    run()
    return seconds_of(run, device) / tokens * shapes.vocabulary / rows


def _attention(tokens: int, shapes: Shapes, work: Workload, device: torch.device) -> PairSeconds:
    size = shapes.query // shapes.heads
    return time_attention(tokens, (shapes.heads, shapes.key // size), size, work.dtype, device)
