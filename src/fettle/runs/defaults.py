"""The choices a newcomer need not make: from the model's size and the data's, to a run that learns.

Sources: rank 16 on every linear layer with a learning rate near 2e-4 is what LoRA's users converged on for
models of 1 to 10 billion weights (Biderman et al., 2024, arXiv 2405.09673, find LoRA wants 10 times full
fine-tuning's rate); smaller models bear, and need, larger steps.
"""

import dataclasses
import math
from typing import Any, TypeVar

from fettle.errors import UserError
from fettle.planning.budget import parse_bytes
from fettle.runs.options import LoopOptions, PlanOptions

Options = TypeVar("Options", bound=LoopOptions)

LONGEST_BY_DEFAULT = 2048
EPOCHS = 3.0
STEPS_AN_EPOCH = 32
"""Fewer updates than this a pass teach little: small data gets shorter packs, so cheaper, more frequent steps."""
MOST_STEPS_AN_EPOCH = 512
"""More updates than this a pass are wasted on noise: large data gets more packs a step."""
CHECKPOINTED_BYTES = 10**9

LARGEST = 1e9
"""Of learning rates, epochs and the like."""

_AT_LEAST_ONE = (
    *("max_length", "max_steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "save_steps"),
    *(
        "rank",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "layers",
        "heads",
        "key_value_heads",
        "context",
    ),
)


def require_sensible(options: LoopOptions | PlanOptions) -> None:
    """Raise UserError for an option whose value cannot mean anything."""
    memory: str | None = getattr(options, "memory", None)
    if memory is not None:
        parse_bytes(memory)
    for name in ("model", "data", "eval_data", "keep_data", "output"):
        if (
            getattr(options, name, None) == ""
        ):  # as `--data "$UNSET"` gives it; it would mean the current folder
            raise UserError(f"--{name.replace('_', '-')} is empty; give a path or a name.")
    for name in _AT_LEAST_ONE:
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")
    for name in ("epochs", "learning_rate", "max_grad_norm", "alpha"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < LARGEST:
            raise UserError(
                f"--{name.replace('_', '-')} is {value}; expected a number above 0, at most a billion."
            )
    for name in ("eval_fraction", "warmup_ratio", "dropout"):
        share: Any = getattr(options, name, 0.0)
        if not 0 <= share < 1:
            raise UserError(f"--{name.replace('_', '-')} is {share}; expected a share from 0 to below 1.")
    for name in ("samples", "weight_decay"):
        count: Any = getattr(options, name, 0)
        if count < 0:
            raise UserError(f"--{name.replace('_', '-')} is {count}; expected 0 or more.")
    seed = getattr(options, "seed", 0)
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; expected a whole number from 0 to {2**32 - 1}.")


def length_limit(options: LoopOptions, context_tokens: int) -> int:
    """The longest row in tokens. Raises UserError where it is longer than the model's context."""
    if options.max_length is None:
        return min(context_tokens, LONGEST_BY_DEFAULT)
    if options.max_length > context_tokens:
        raise UserError(
            f"--max-length is {options.max_length}, and the model's context is {context_tokens} tokens; "
            f"ask for at most that."
        )
    return options.max_length


def pack_length(lengths: list[int], longest: int) -> int:
    """Tokens a pack: short enough that small data still makes STEPS_AN_EPOCH packs, never below a row."""
    share = math.ceil(sum(lengths) / STEPS_AN_EPOCH)
    return min(longest, max(share, max(lengths)))


def learning_rate(parameters: int, *, is_full: bool = False) -> float:
    """Peak learning rate of AdamW for a model of so many weights; of its adapters, unless `is_full`."""
    for limit, rate in ((5e7, 2e-3), (5e8, 5e-4), (2e9, 3e-4)):
        if parameters < limit:
            return rate if not is_full else rate / 2
    return 2e-4 if not is_full else 2e-5


def complete(
    options: Options, *, packs: int, parameters: int, weight_bytes: int = 0, is_full: bool = False
) -> Options:
    """Return the options with every None that the loop needs replaced by its value for this run."""
    batch = options.batch_size or 1
    # more rows a step by accumulation: rows side by side would need the memory of all of them at once
    accumulation = options.gradient_accumulation_steps or max(1, round(packs / batch / MOST_STEPS_AN_EPOCH))
    epochs = options.epochs or EPOCHS
    an_epoch = math.ceil(packs / (batch * accumulation))
    steps = options.max_steps or max(1, math.ceil(epochs * an_epoch))
    checkpointing = options.gradient_checkpointing
    if checkpointing is None and is_full:  # else the memory plan decides, layer by layer
        checkpointing = weight_bytes > CHECKPOINTED_BYTES
    return dataclasses.replace(
        options,
        batch_size=batch,
        gradient_accumulation_steps=accumulation,
        epochs=epochs,
        max_steps=steps,
        learning_rate=options.learning_rate or learning_rate(parameters, is_full=is_full),
        gradient_checkpointing=checkpointing,
        eval_steps=options.eval_steps or max(1, math.ceil(steps / 5)),
        save_steps=options.save_steps or max(1, math.ceil(steps / 10)),
    )
