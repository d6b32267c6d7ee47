"""What a training step keeps in memory, in bytes: what is held is counted; what is at work was set by measuring.

    weights, adapters, optimizer    counted from the config's shapes
    what a layer keeps              counted, tensor by tensor (see recompute/policies.py)
    a layer at work                 counted in the code, then set right by measuring: `working_bytes`
    the head at work                twice a chunk's logits, three times where they are capped (ops/token_log_probs.py)
    holes in the C library's heap   measured: HEAP_GAPS
    the process without a model     measured (runs/memory_plan.py)

By policy, in units of tokens * hidden size and for Phi-3.5's shapes; beside what is at work come a tile of the MLP and,
in NF4, an unpacked matrix:

                      kept    at work on a CPU    on a GPU
    KEEP              13.4          10               6
    DROP              11.4          11               6
    REDO_MLP           6            11               6
    KEEP_ATTENTION     2            17               9
    REDO               1            17              10
    PARK               0             -              12

A step's peak is what stays throughout (weights, adapters, optimiser), what the layers keep for backward, and the
working memory of whichever part is at work when most is kept. `peak_of_policies` walks through the backward
pass, where kept memory falls layer by layer while each layer at work needs its own room.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fettle.ops.dispatch import best_product_dtype
from fettle.ops.lora_mlp import TILE_TOKENS
from fettle.ops.token_log_probs import buffer_shapes, chunk_tokens
from fettle.planning.shapes import Shapes
from fettle.recompute.policies import Policy

HEAP_GAPS = 0.3
"""What the C library's heap loses to gaps, in terms of what the layers keep: measured, 0.3 to 0.5 on models of 5 to 50
million weights, of which STEP_BYTES has a part. A layer that is recomputed leaves at least as much as if it kept a
quarter of what it could; its own work takes half as much again, and with NF4 its unpacked matrices take twice their
size."""

STEP_BYTES, STEP_TOKEN_BYTES = 40_000_000, 64_000
"""What a step has at work on a CPU whatever the model's width: tiles of attention's scores, the products' packed
operands, autograd's own objects. By token, up to the first; measured, 25 to 49 MB from 512 tokens on, 10 at 200."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256
"""A weight in NF4: its code, its share of a block's scale in one byte, and of that scale's own scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained on what.

    tokens: of all rows side by side; documents: how many of equal length they hold; batch_size: the rows. rank: 1 or
    more. targets: adapted matrix -> in how many layers, None for all. has_outer_embedding: the token table is in the
    host's memory, or its file. returns_memory: on a CPU, freed tensors go back to the system at once instead of into
    the heap.
    stored_item: bytes of a weight in its file, 0 if that is not known. evaluated_tokens: of the longest batch of
    held-out rows; answered_tokens: of the longest question with its answer; 0 if there is none.
    """

    tokens: int
    documents: int = 1
    batch_size: int = 1
    rank: int = 16
    targets: Mapping[str, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    is_nf4: bool = False
    has_dropout: bool = False
    device_type: str = "cpu"
    has_outer_embedding: bool = False
    returns_memory: bool = False
    stored_item: int = 0
    evaluated_tokens: int = 0
    answered_tokens: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected 1 or more")

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    @property
    def product_item(self) -> int:
        """Bytes of a number in the layers' products, which may run in a wider type."""
        return best_product_dtype(self.device_type, self.dtype).itemsize

    @property
    def row_tokens(self) -> int:
        """Tokens of one row."""
        return self.tokens // self.batch_size

    def with_tokens(self, tokens: int) -> "Workload":
        """The same with rows of another total length, what is evaluated and answered in proportion."""
        evaluated, answered = (
            -(-n * tokens // self.tokens) for n in (self.evaluated_tokens, self.answered_tokens)
        )
        return replace(self, tokens=tokens, evaluated_tokens=evaluated, answered_tokens=answered)

    def with_batch_size(self, batch_size: int) -> "Workload":
        """The same with fewer rows side by side."""
        tokens, documents = (n * batch_size // self.batch_size for n in (self.tokens, self.documents))
        return replace(self, tokens=tokens, documents=max(1, documents), batch_size=batch_size)


def runs_whole_mlp(shapes: Shapes, work: Workload) -> bool:
    """Whether the MLP runs as one function, which can redo its inside."""
    return shapes.has_whole_mlp and not work.has_dropout


def weight_bytes(shapes: Shapes, work: Workload) -> int:
    """The model's weights as held: NF4 takes the layers' matrices, the rest keeps its dtype."""
    matrices = shapes.layers * shapes.layer_weights
    rest = shapes.parameters - matrices - (shapes.embedding if work.has_outer_embedding else 0)
    return int(matrices * (NF4_BYTES if work.is_nf4 else work.item) + rest * work.item)


def trained_bytes(shapes: Shapes, work: Workload) -> tuple[int, int, int]:
    """Adapters, their gradients, and AdamW's two moments: all fp32."""
    count = shapes.adapter_parameters(work.rank, work.targets)
    if work.device_type == "cuda":
        return (4 + work.item) * count, 4 * count, 8 * count  # with copies in the model's dtype
    return 4 * count, 4 * count, 8 * count


def kept_by_layer(shapes: Shapes, work: Workload, policy: Policy) -> int:
    """What one layer keeps from forward to backward, its input included."""
    s, hidden = shapes, shapes.hidden
    attention_result = s.query * work.item + 4 * s.heads  # and the fp32 logsumexp
    if policy.is_recomputed:
        per_token = 0 if policy.is_offloaded else hidden * work.item
        per_token += attention_result if policy.attention else 0
    else:
        is_whole = runs_whole_mlp(s, work)
        elements = 2 * hidden + s.query + 2 * s.key  # inputs of both norms; q, k, v
        elements += 2 * hidden if s.has_sandwich_norms else 0
        elements += s.query + s.key if s.has_qk_norm else 0
        elements += 2 * s.intermediate if policy.gates or not is_whole else 0
        elements += s.intermediate if not is_whole else 0
        elements += 2 * hidden if policy.norms else 0
        elements += work.rank * sum(name.startswith(("q", "k", "v", "o")) for name in s.matrices)  # x A^T
        norms = 4 if s.has_sandwich_norms else 2
        norms += s.heads + s.key * s.heads // s.query if s.has_qk_norm else 0
        per_token = elements * work.item + attention_result + 4 * norms  # each norm's fp32 factor
    return work.tokens * per_token


def working_bytes(shapes: Shapes, work: Workload, policy: Policy) -> int:
    """The most one layer needs in its own backward pass, beside what it kept: in its MLP or its attention.

    What each part has at once was counted in the code and set right by measuring: on a GPU with 6 layers of four
    models at 32,768 tokens; on a CPU, whose heap closes its holes late, with predictions.py.
    """
    s, hidden = shapes, shapes.hidden
    tile = min(work.tokens, TILE_TOKENS[work.device_type])
    inside = (4 if policy.gates else 6) * s.intermediate + hidden
    by_token = _per_token_cuda if work.device_type == "cuda" else _per_token_cpu
    mlp, attention = (work.tokens * each * work.product_item for each in by_token(s, policy))
    mlp += tile * inside * work.product_item
    if work.device_type == "cpu":  # whose unpacked matrices share a room
        return max(mlp, attention)
    return max(
        mlp + _unpacked(work, 3 * hidden * s.intermediate),
        attention + _unpacked(work, s.query * hidden),
    )


def _per_token_cpu(s: Shapes, policy: Policy) -> tuple[int, int]:
    """Elements a token at work in backward: around the MLP's tiles, and in attention."""
    redone = 3 * s.hidden + 2 * s.query + 2 * s.key if policy.is_recomputed else 0
    redone += 0 if policy.is_recomputed or policy.norms else s.hidden
    return 2 * s.hidden + redone, 2 * s.hidden + 2 * s.query + 2 * (s.query + 2 * s.key) + redone


def _per_token_cuda(s: Shapes, policy: Policy) -> tuple[int, int]:
    """The same on a GPU."""
    more = 2 * s.hidden if s.has_sandwich_norms else 0
    if not policy.is_recomputed:
        return 2 * s.hidden + more // 2, 2 * s.hidden + 3 * s.query + s.key + more
    redone = 0 if policy.attention else s.query  # attention's result
    fetched = 2 * s.hidden if policy.is_offloaded else 0
    around_mlp = 6 * s.hidden + s.query + 2 * s.key + redone + fetched + more // 2
    return around_mlp, 4 * s.hidden + 4 * s.query + s.key + redone + fetched + more


def scratch_bytes(shapes: Shapes, work: Workload) -> int:
    """On a CPU: the scratch buffer (ops/scratch.py): an MLP's three matrices, or the logits of a chunk of tokens."""
    if work.device_type != "cpu":
        return 0
    return max(_unpacked(work, 3 * shapes.hidden * shapes.intermediate), _head_scratch(shapes, work))


def _unpacked(work: Workload, weights: int) -> int:
    """A matrix at work in another form than it is held in."""
    is_converted = work.is_nf4 or work.product_item > work.item
    return weights * work.product_item if is_converted else 0


def head_bytes(shapes: Shapes, work: Workload) -> int:
    """The head at work: the last hidden states and their gradient, and on a GPU a chunk's buffers, which on a CPU are
    in the scratch memory."""
    chunk = _head_scratch(shapes, work) if work.device_type == "cuda" else 0
    return chunk + 4 * work.tokens * shapes.hidden * work.item


def _head_scratch(shapes: Shapes, work: Workload) -> int:
    """A chunk's buffers, in fp32."""
    tokens = min(work.tokens, chunk_tokens(shapes.vocabulary, work.device_type))
    is_converted = work.product_item > work.item
    size = (shapes.vocabulary, shapes.hidden)
    buffers = buffer_shapes(tokens, size, is_capped=shapes.caps_logits, is_converted=is_converted)
    return 4 * sum(shape.numel() for shape in buffers)


Runs = Sequence[tuple[Policy, int]]
"""Policies with how many consecutive layers have each, from the first layer on."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What a step takes beside weights, adapters and optimizer state, in bytes; for any choice of policies.

    kept, working, gap: of one layer, by policy; gap is what the C library's heap loses. head: the head at work.
    held: throughout the step. hidden_states: a layer's input.
    """

    is_cpu: bool
    kept: dict[Policy, int]
    working: dict[Policy, int]
    gap: dict[Policy, int]
    head: int
    held: int
    hidden_states: int

    @classmethod
    def of(cls, shapes: Shapes, work: Workload) -> "StepMemory":
        """Count each policy once: a search asks for thousands of combinations."""
        is_cpu = work.device_type == "cpu"
        kept = {policy: kept_by_layer(shapes, work, policy) for policy in Policy}
        working = {policy: working_bytes(shapes, work, policy) for policy in Policy}
        gap = dict.fromkeys(Policy, 0)
        held = trained_bytes(shapes, work)[1]
        if is_cpu:
            held += scratch_bytes(shapes, work) + min(STEP_BYTES, STEP_TOKEN_BYTES * work.tokens)
        if is_cpu and not work.returns_memory:
            # the heap does not close the holes that one part leaves for the next
            gap = {policy: max(size, kept[Policy.KEEP] // 4) for policy, size in kept.items()}
            working = {p: size if p.gates else 3 * size // 2 for p, size in working.items()}
            held += _unpacked(work, 3 * shapes.hidden * shapes.intermediate) if work.is_nf4 else 0
        hidden_states = work.tokens * shapes.hidden * work.item
        return cls(is_cpu, kept, working, gap, head_bytes(shapes, work), held, hidden_states)

    def peak(self, runs: Runs) -> tuple[int, int]:
        """Return the bytes kept by all layers, and the most that these come to with gradients and working memory."""
        total = sum(count * self.kept[policy] for policy, count in runs)
        if self.is_cpu:
            gaps = int(HEAP_GAPS * sum(count * self.gap[policy] for policy, count in runs))
            layer = max(self.working[policy] for policy, _ in runs)
            return total, total + gaps + layer + self.head + self.held
        # A graph holds its input, output, their copies and gradient; if layers are offloaded, only the output.
        copies = 1 if any(policy.is_offloaded for policy, _ in runs) else 5
        left = total + self.held + copies * self.hidden_states
        peak = left + self.head
        for policy, count in reversed(runs):  # of equal layers the first in backward needs most
            peak = max(peak, left + self.working[policy])
            left -= count * self.kept[policy]
        return total, peak
