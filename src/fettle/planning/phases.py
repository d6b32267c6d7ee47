"""The memory of a run on a CPU outside its training steps: loading, evaluation, answers before and after training.

A run's peak is that of its largest phase. Memory is returned to the system between phases
(`allocator.release_unused`), so gaps in the heap do not carry over. Saving needs one more copy of the adapters, no more
than their gradients, and is not counted. On a GPU only training is counted.
"""

from fettle.ops.attention import QUERIES_AT_ONCE
from fettle.ops.lora_mlp import TILE_TOKENS
from fettle.planning.costs import (
    Workload,
    scratch_bytes,
    trained_bytes,
    weight_bytes,
)
from fettle.planning.shapes import Shapes

MOST_ANSWERS = 64
"""The most questions answered in one batch."""


def other_phases(shapes: Shapes, work: Workload, base: int) -> dict[str, int]:
    """Return the peak bytes of each phase other than training, by name; empty on a GPU.

    base: bytes of the process without a model.
    """
    if work.device_type != "cpu":
        return {}
    held = base + weight_bytes(shapes, work) + trained_bytes(shapes, work)[0]
    phases = {"loading": base + loading_bytes(shapes, work)}
    if work.evaluated_tokens:
        phases["evaluation"] = held + evaluation_bytes(shapes, work)
    if work.answered_tokens:
        phases["answers"] = held + answers_bytes(shapes, work, 1)
    return phases


def loading_bytes(shapes: Shapes, work: Workload) -> int:
    """Return the bytes of the weights and, if the dtype changes, of the mapped file.

    NF4 weights are quantized tensor by tensor.
    """
    is_changed = not work.is_nf4 and work.stored_item not in (0, work.item)
    return weight_bytes(shapes, work) + (work.stored_item * shapes.parameters if is_changed else 0)


def evaluation_bytes(shapes: Shapes, work: Workload) -> int:
    """Return the bytes of a forward pass over a batch of held-out rows, including the head."""
    passing = _layer_forward(shapes, work, work.evaluated_tokens)
    hidden_states = 2 * work.evaluated_tokens * shapes.hidden * work.item
    return passing + scratch_bytes(shapes, work) + hidden_states


def answers_bytes(shapes: Shapes, work: Workload, count: int) -> int:
    """Return the bytes to answer `count` of the longest questions in one batch.

    The key-value cache of every layer, twice because it is copied as it grows; the working memory of one layer on the
    prompts; attention masks and, with softcapping, scores; and the logits of the last tokens.
    """
    tokens = count * work.answered_tokens
    cache = 2 * 2 * shapes.layers * shapes.key * tokens * work.item
    pairs = tokens * work.answered_tokens
    attention = pairs * (1 + work.item)  # a boolean mask and its additive form
    if shapes.caps_logits:  # and the mask of the sliding window; bf16 scores, capped scores and fp32 weights
        queries = count * min(work.answered_tokens, QUERIES_AT_ONCE)
        attention += pairs * work.item + 12 * shapes.heads * queries * work.answered_tokens
    attention += 2 * tokens * shapes.query * work.item if shapes.key < shapes.query else 0
    logits = count * shapes.vocabulary * 4 * (5 if shapes.caps_logits else 3)
    scratch = scratch_bytes(shapes, work)
    return cache + _layer_forward(shapes, work, tokens) + attention + logits + scratch


def most_answers(shapes: Shapes, work: Workload, base: int, peak: int) -> int:
    """Return how many questions to answer in one batch: as many as fit into `peak` bytes, at least one."""
    if work.device_type != "cpu" or not work.answered_tokens:
        return MOST_ANSWERS
    free = peak - base - weight_bytes(shapes, work) - trained_bytes(shapes, work)[0]
    fitting = (n for n in range(MOST_ANSWERS, 1, -1) if answers_bytes(shapes, work, n) <= free)
    return next(fitting, 1)


def _layer_forward(shapes: Shapes, work: Workload, tokens: int) -> int:
    """Return the peak bytes of one layer in a pass without gradients: its input; queries, keys and values with their
    rotated copies; attention's result; a tile of its MLP."""
    per_token = 4 * shapes.hidden + 3 * shapes.query + 4 * shapes.key
    tile = min(tokens, TILE_TOKENS["cpu"]) * 3 * shapes.intermediate
    return (tokens * per_token + tile) * work.product_item
