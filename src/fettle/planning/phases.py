"""The memory of a run on a CPU outside its training steps: loading, evaluation, answers before and after training.

A run's peak is that of its largest phase. Memory is returned to the system between phases
(`allocator.release_unused`), so gaps in the heap do not carry over. Saving needs one more copy of the adapters, no more
than their gradients, and is not counted. On a GPU only training is counted.
"""

from fettle.engine.pages import PAGE_SIZE
from fettle.engine.scheduler import MOST_RUNNING, STEP_TOKENS
from fettle.ops.dispatch import FEW_ROWS
from fettle.ops.lora_mlp import TILE_TOKENS
from fettle.planning.costs import (
    Workload,
    scratch_bytes,
    trained_bytes,
    weight_bytes,
)
from fettle.planning.shapes import Shapes


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


def cache_bytes(shapes: Shapes, work: Workload, count: int) -> int:
    """Return the bytes of the keys and values of `count` of the longest questions with their answers."""
    tokens = -(-max(1, work.answered_tokens) // PAGE_SIZE) * PAGE_SIZE
    return 2 * shapes.layers * shapes.key * count * tokens * work.item


def answers_bytes(shapes: Shapes, work: Workload, count: int) -> int:
    """Return the bytes to answer questions, `count` of the longest at a time.

    The key-value cache; then the larger of a step of prompts and a step of new tokens. Prompts: the working memory of
    one layer and, behind an earlier chunk, the mask of their scores. New tokens: one layer's keys and values gathered
    from their pages, the scores if they are capped, and the logits.
    """
    step = STEP_TOKENS[work.device_type]
    tokens = min(count * work.answered_tokens, step)
    prompts = _layer_forward(shapes, work, tokens)
    if work.answered_tokens > step:
        prompts += tokens * work.answered_tokens * (1 + work.product_item)
    gathered = count * work.answered_tokens * (2 * shapes.key * work.product_item + 5)
    if shapes.caps_logits:  # scores in two dtypes, capped scores and fp32 weights
        gathered += 12 * count * shapes.heads * work.answered_tokens
    logits = count * shapes.vocabulary * 4 * (5 if shapes.caps_logits else 3)
    scratch = max(scratch_bytes(shapes, work), _head_copy_bytes(shapes, work, count))
    return cache_bytes(shapes, work, count) + max(prompts, gathered) + logits + scratch


def _head_copy_bytes(shapes: Shapes, work: Workload, rows: int) -> int:
    """Return the bytes of a copy of the head for a product of `rows` rows.

    A CPU that multiplies in 16 bits rearranges it; one that does not widens it, except for a few rows.
    """
    is_copied = work.item < 4 and (work.product_item == work.item or rows >= FEW_ROWS)
    return shapes.vocabulary * shapes.hidden * work.product_item if is_copied else 0


def most_answers(shapes: Shapes, work: Workload, base: int, peak: int) -> int:
    """Return how many questions to answer at a time: as many as fit into `peak` bytes, at least one."""
    if not work.answered_tokens:
        return 1
    free = peak - base - weight_bytes(shapes, work) - trained_bytes(shapes, work)[0]
    fitting = (n for n in range(MOST_RUNNING, 1, -1) if answers_bytes(shapes, work, n) <= free)
    return next(fitting, 1)


def _layer_forward(shapes: Shapes, work: Workload, tokens: int) -> int:
    """Return the peak bytes of one layer in a pass without gradients: its input; queries, keys and values with their
    rotated copies; attention's result; a tile of its MLP."""
    per_token = 4 * shapes.hidden + 3 * shapes.query + 4 * shapes.key
    tile = min(tokens, TILE_TOKENS["cpu"]) * 3 * shapes.intermediate
    return (tokens * per_token + tile) * work.product_item
