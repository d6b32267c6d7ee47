"""The memory of a training step, in bytes: what is held is counted; working memory is counted, then calibrated.

    weights, adapters, optimizer    counted from the config's shapes
    activations kept by a layer     counted, tensor by tensor (see recompute/policies.py)
    working memory of a layer       counted in the code, then calibrated by measurement: `working_bytes`
    working memory of the head      twice a chunk's logits, three times if they are capped (ops/token_log_probs.py)
    gaps in the C library's heap    measured: HEAP_GAPS
    the process without a model     measured (runs/memory_plan.py)

By policy, in units of tokens * hidden size and for Phi-3.5's shapes. The working memory also includes one tile of the
MLP and, with NF4, one dequantized matrix, which this table leaves out:

                       kept    working, CPU    working, GPU
    KEEP               13.4         10               6
    RECOMPUTE_NORMS    11.4         11               6
    RECOMPUTE_MLP       6           11               6
    KEEP_ATTENTION      2           17               9
    RECOMPUTE           1           17              10
    OFFLOAD             0            -              12

A step's peak is the sum of what is held throughout (weights, adapters, optimizer), what the layers keep for backward,
and the working memory of the active part. On a GPU `StepMemory.peak` walks through the backward pass, where kept
memory falls layer by layer while the active layer needs its own working memory, and takes the maximum; on a CPU it
adds the largest working memory to everything kept.
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
"""Bytes that the C library's heap loses to gaps, as a fraction of what the layers keep. Measured: 0.3 to 0.5 on models
of 5 to 50 million weights, part of which STEP_BYTES covers. Also calibrated, in `StepMemory.of`: a recomputed layer
leaves gaps as if it kept at least a quarter of what KEEP does, its working memory is 1.5 times as large, and with NF4
the dequantized matrices take twice their size."""

STEP_BYTES, STEP_TOKEN_BYTES = 40_000_000, 64_000
"""Working memory of a step on a CPU that does not depend on the model's width: tiles of attention scores, packed
operands of the matrix products, autograd's own objects. STEP_TOKEN_BYTES per token, at most STEP_BYTES. Measured: 25
to 49 MB from 512 tokens on, 10 MB at 200."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes per weight in NF4: a 4-bit code, an 8-bit scale per block of 64 weights, and an fp32 scale per 256 of those
scales (double quantization; QLoRA, Dettmers et al. 2023)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained, on what data and on which device.

    tokens: in one batch, over all its rows; documents: how many documents of equal length those tokens hold;
    batch_size: rows per batch. rank: 1 or more. targets: adapted matrix -> in how many layers, None for all matrices of
    all layers. has_offloaded_embedding: the token embedding is in host memory (GPU) or memory-mapped from its file
    (CPU). returns_memory: on a CPU, freed tensors are returned to the system immediately instead of kept in the heap.
    stored_item: bytes per weight in the checkpoint file, 0 if unknown. evaluated_tokens: tokens of the largest batch
    of held-out rows; answered_tokens: tokens of the longest question with its answer; 0 if there is none.
    forward_passes: passes without gradient per batch, each over as many tokens, such as that of a reference model.
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
    has_offloaded_embedding: bool = False
    returns_memory: bool = False
    stored_item: int = 0
    evaluated_tokens: int = 0
    answered_tokens: int = 0
    forward_passes: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected 1 or more")

    @property
    def item(self) -> int:
        """Bytes per element of an activation."""
        return self.dtype.itemsize

    @property
    def product_item(self) -> int:
        """Bytes per element in the layers' matrix products, which may run in a wider dtype."""
        return best_product_dtype(self.device_type, self.dtype).itemsize

    @property
    def row_tokens(self) -> int:
        """Tokens per row."""
        return self.tokens // self.batch_size

    def with_tokens(self, tokens: int) -> "Workload":
        """Return a copy with `tokens` per batch; the evaluated and answered tokens scale in proportion, rounded up."""
        evaluated, answered = (
            -(-n * tokens // self.tokens) for n in (self.evaluated_tokens, self.answered_tokens)
        )
        return replace(self, tokens=tokens, evaluated_tokens=evaluated, answered_tokens=answered)

    def with_batch_size(self, batch_size: int) -> "Workload":
        """Return a copy with another number of rows per batch, of the same length."""
        tokens, documents = (n * batch_size // self.batch_size for n in (self.tokens, self.documents))
        return replace(self, tokens=tokens, documents=max(1, documents), batch_size=batch_size)


def runs_whole_mlp(shapes: Shapes, work: Workload) -> bool:
    """Return whether the MLP runs as one function, `lora_mlp`, which can recompute its intermediate activations."""
    return shapes.has_whole_mlp and not work.has_dropout


def weight_bytes(shapes: Shapes, work: Workload) -> int:
    """Return the bytes of the model's weights: the layers' matrices in NF4 if `is_nf4`, the rest in `dtype`."""
    matrices = shapes.layers * shapes.layer_weights
    rest = shapes.parameters - matrices - (shapes.embedding if work.has_offloaded_embedding else 0)
    return int(matrices * (NF4_BYTES if work.is_nf4 else work.item) + rest * work.item)


def trained_bytes(shapes: Shapes, work: Workload) -> tuple[int, int, int]:
    """Return the bytes of the adapters, their gradients, and AdamW's two moments: all fp32."""
    count = shapes.adapter_parameters(work.rank, work.targets)
    if work.device_type == "cuda":
        return (4 + work.item) * count, 4 * count, 8 * count  # adapters with a copy in the model's dtype
    return 4 * count, 4 * count, 8 * count


def kept_by_layer(shapes: Shapes, work: Workload, policy: Policy) -> int:
    """Return the bytes that one layer keeps from forward to backward, including its input."""
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
        per_token = elements * work.item + attention_result + 4 * norms  # and fp32 1/RMS per norm
    return work.tokens * per_token


def working_bytes(shapes: Shapes, work: Workload, policy: Policy) -> int:
    """Return the peak bytes that one layer needs in its backward pass besides what it kept: in its MLP or attention.

    The tensors that are alive at the same time were counted in the code, then calibrated by measurement: on a GPU with
    6 layers of four models at 32,768 tokens; on a CPU, whose heap reuses its gaps late, with benchmarks/predictions.py.
    """
    s, hidden = shapes, shapes.hidden
    tile = min(work.tokens, TILE_TOKENS[work.device_type])
    inside = (4 if policy.gates else 6) * s.intermediate + hidden
    by_token = _per_token_cuda if work.device_type == "cuda" else _per_token_cpu
    mlp, attention = (work.tokens * each * work.product_item for each in by_token(s, policy))
    mlp += tile * inside * work.product_item
    if work.device_type == "cpu":  # dequantized matrices share the scratch buffer, counted in `scratch_bytes`
        return max(mlp, attention)
    return max(
        mlp + _unpacked(work, 3 * hidden * s.intermediate),
        attention + _unpacked(work, s.query * hidden),
    )


def _per_token_cpu(s: Shapes, policy: Policy) -> tuple[int, int]:
    """Return the working elements per token in backward: around the MLP's tiles, and in attention."""
    recomputed = 3 * s.hidden + 2 * s.query + 2 * s.key if policy.is_recomputed else 0
    recomputed += 0 if policy.is_recomputed or policy.norms else s.hidden
    return 2 * s.hidden + recomputed, 2 * s.hidden + 2 * s.query + 2 * (s.query + 2 * s.key) + recomputed


def _per_token_cuda(s: Shapes, policy: Policy) -> tuple[int, int]:
    """Return the same as `_per_token_cpu`, on a GPU."""
    more = 2 * s.hidden if s.has_sandwich_norms else 0
    if not policy.is_recomputed:
        return 2 * s.hidden + more // 2, 2 * s.hidden + 3 * s.query + s.key + more
    recomputed = 0 if policy.attention else s.query  # attention's result
    fetched = 2 * s.hidden if policy.is_offloaded else 0
    around_mlp = 6 * s.hidden + s.query + 2 * s.key + recomputed + fetched + more // 2
    return around_mlp, 4 * s.hidden + 4 * s.query + s.key + recomputed + fetched + more


def scratch_bytes(shapes: Shapes, work: Workload) -> int:
    """Return the bytes of the CPU's scratch buffer (ops/scratch.py), 0 on a GPU.

    It holds the MLP's three matrices, dequantized or widened, or the logits of one chunk of tokens.
    """
    if work.device_type != "cpu":
        return 0
    return max(_unpacked(work, 3 * shapes.hidden * shapes.intermediate), _head_scratch(shapes, work))


def _unpacked(work: Workload, weights: int) -> int:
    """Return the bytes of `weights` elements dequantized or widened for a product; 0 if they are used as stored."""
    is_converted = work.is_nf4 or work.product_item > work.item
    return weights * work.product_item if is_converted else 0


def head_bytes(shapes: Shapes, work: Workload) -> int:
    """Return the head's working bytes: the last hidden states, their gradient and, on a GPU, the buffers of one chunk.

    On a CPU the chunk's buffers are in the scratch buffer.
    """
    chunk = _head_scratch(shapes, work) if work.device_type == "cuda" else 0
    return chunk + 4 * work.tokens * shapes.hidden * work.item


def _head_scratch(shapes: Shapes, work: Workload) -> int:
    """Return the bytes of one chunk's buffers, all fp32."""
    tokens = min(work.tokens, chunk_tokens(shapes.vocabulary, work.device_type))
    is_converted = work.product_item > work.item
    size = (shapes.vocabulary, shapes.hidden)
    buffers = buffer_shapes(tokens, size, is_capped=shapes.caps_logits, is_converted=is_converted)
    return 4 * sum(shape.numel() for shape in buffers)


Runs = Sequence[tuple[Policy, int]]
"""(policy, number of consecutive layers that have it), from the first layer on."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What a step needs besides weights, adapters and optimizer state, in bytes, for any choice of policies.

    kept, working, gap: of one layer, by policy: what it keeps for backward, its peak working memory, and what gaps in
    the C library's heap are proportional to (see HEAP_GAPS). head: working memory of the head. held: throughout the
    step. hidden_states: one layer's input.
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
        """Compute each policy's bytes once: a search tries thousands of combinations."""
        is_cpu = work.device_type == "cpu"
        kept = {policy: kept_by_layer(shapes, work, policy) for policy in Policy}
        working = {policy: working_bytes(shapes, work, policy) for policy in Policy}
        gap = dict.fromkeys(Policy, 0)
        held = trained_bytes(shapes, work)[1]
        if is_cpu:
            held += scratch_bytes(shapes, work) + min(STEP_BYTES, STEP_TOKEN_BYTES * work.tokens)
        if is_cpu and not work.returns_memory:
            # the next part cannot reuse all the gaps that one part leaves in the heap
            gap = {policy: max(size, kept[Policy.KEEP] // 4) for policy, size in kept.items()}
            working = {p: size if p.gates else 3 * size // 2 for p, size in working.items()}
            held += _unpacked(work, 3 * shapes.hidden * shapes.intermediate) if work.is_nf4 else 0
        hidden_states = work.tokens * shapes.hidden * work.item
        return cls(is_cpu, kept, working, gap, head_bytes(shapes, work), held, hidden_states)

    def peak(self, runs: Runs) -> tuple[int, int]:
        """Return the bytes kept by all layers, and the peak of these with gradients and working memory."""
        total = sum(count * self.kept[policy] for policy, count in runs)
        if self.is_cpu:
            gaps = int(HEAP_GAPS * sum(count * self.gap[policy] for policy, count in runs))
            layer = max(self.working[policy] for policy, _ in runs)
            return total, total + gaps + layer + self.head + self.held
        # CUDA graphs hold input, output, their copies and a gradient; offloaded layers run without: only the output.
        copies = 1 if any(policy.is_offloaded for policy, _ in runs) else 5
        left = total + self.held + copies * self.hidden_states
        peak = left + self.head
        for policy, count in reversed(runs):  # in a run of equal layers, the first in backward has the peak
            peak = max(peak, left + self.working[policy])
            left -= count * self.kept[policy]
        return total, peak
