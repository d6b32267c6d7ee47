"""Validation of options, and defaults chosen from the size of the model and the data.

Sources: rank 16 on every linear layer with a learning rate near 2e-4 is common practice for LoRA on models of
1 to 10 billion parameters (Biderman et al., 2024, arXiv 2405.09673, find that LoRA needs 10 times the learning
rate of full fine-tuning); smaller models tolerate, and need, higher learning rates.
"""

import dataclasses
import math
from importlib.util import find_spec
from typing import Any, TypeVar

from fettle.errors import UserError, option
from fettle.planning.budget import parse_bytes
from fettle.runs.method_facts import METHOD_FACTS, MethodFacts
from fettle.runs.options import LoopOptions, PlanOptions, TrainOptions

Options = TypeVar("Options", bound=LoopOptions)

DEFAULT_MAX_LENGTH = 2048
MIN_STEPS_PER_EPOCH = 32
"""Fewer updates per epoch teach little, so small data gets shorter packs, and thus more and cheaper steps."""
MAX_STEPS_PER_EPOCH = 512
"""More updates per epoch mostly follow noise, so large data gets more packs per step."""
CHECKPOINTING_THRESHOLD_BYTES = 10**9

LARGEST = 1e9
"""Upper limit of learning rates, epochs and similar numbers."""

_AT_LEAST_ONE = (
    *("max_length", "max_steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "save_steps"),
    *(
        "early_stopping",
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


def require_valid(options: LoopOptions | PlanOptions) -> None:
    """Raise UserError for an option whose value is out of range."""
    memory: str | None = getattr(options, "memory", None)
    if memory is not None:
        parse_bytes(memory)
    for name in ("data", "eval_data", "keep_data", "output"):
        # such as from `--data "$UNSET"`; an empty path would mean the current folder
        if getattr(options, name, None) == "":
            raise UserError(f"{option(name)} is empty; expected a path or a name.")
    for name in _AT_LEAST_ONE:
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"{option(name)} is {value}; expected 1 or more.")
    for name in ("epochs", "learning_rate", "max_grad_norm", "alpha"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < LARGEST:
            raise UserError(f"{option(name)} is {value}; expected a number above 0 and below a billion.")
    for name in ("eval_fraction", "warmup_ratio", "dropout"):
        share: Any = getattr(options, name, 0.0)
        if not 0 <= share < 1:
            raise UserError(f"{option(name)} is {share}; expected a fraction from 0 to below 1.")
    for name in ("samples", "weight_decay"):
        count: Any = getattr(options, name, 0)
        if count < 0:
            raise UserError(f"{option(name)} is {count}; expected 0 or more.")
    if isinstance(options, TrainOptions):
        _require_for_method(options)
    if isinstance(options, LoopOptions):
        require_tracker(options)
        require_held_out(options, has_held_out=options.eval_data is not None or options.eval_fraction > 0)
    seed = getattr(options, "seed", 0)
    if not 0 <= seed < 2**32:
        raise UserError(f"{option('seed')} is {seed}; expected a whole number from 0 to {2**32 - 1}.")


def require_tracker(options: LoopOptions) -> None:
    """Raise UserError if the package that the metrics are to be sent to is not installed."""
    if options.report_to is not None and find_spec(options.report_to) is None:
        raise UserError(
            f"{option('report_to')} {options.report_to} needs the package {options.report_to}, which is not installed; "
            f"install it with: pip install {options.report_to}."
        )


def require_held_out(options: LoopOptions, *, has_held_out: bool) -> None:
    """Raise UserError for an option that needs held-out rows if there are none."""
    for name in ("early_stopping", "keep_best"):
        if getattr(options, name) and not has_held_out:
            raise UserError(
                f"{option(name)} needs held-out rows, and there are none; give {option('eval_data')}, or leave it out."
            )


def _require_for_method(options: TrainOptions) -> None:
    """Raise UserError for an option that the method does not have, or whose value is out of range."""
    if options.method not in METHOD_FACTS:
        raise UserError(f"{option('method')} is {options.method!r}; expected {', '.join(METHOD_FACTS)}.")
    facts = METHOD_FACTS[options.method]
    usual = {field.name: field.default for field in dataclasses.fields(options)}
    for name in sorted({name for each in METHOD_FACTS.values() for name in each.options}):
        if getattr(options, name) != usual[name] and name not in facts.options:
            methods = [method for method, each in METHOD_FACTS.items() if name in each.options]
            raise UserError(
                f"{option(name)} belongs to {option('method')} {' or '.join(methods)}, but the method is "
                f"{options.method}; leave it out."
            )
    losses = weighted_losses(options) if facts.losses else {}
    if "kto" in losses and options.batch_size == 1:
        raise UserError(
            f"{option('batch_size')} is 1, but the loss kto needs an answer to another prompt in the same batch; "
            "use 2 or more."
        )
    if options.beta is not None and not 0 < options.beta < LARGEST:
        raise UserError(f"{option('beta')} is {options.beta}; expected a number above 0.")
    if options.margin is not None and not 0 <= options.margin < LARGEST:
        raise UserError(f"{option('margin')} is {options.margin}; expected 0 or more.")
    if options.label_smoothing is not None and not 0 <= options.label_smoothing < 0.5:
        raise UserError(
            f"{option('label_smoothing')} is {options.label_smoothing}; expected a fraction from 0 to below 0.5."
        )


def weighted_losses(options: TrainOptions) -> dict[str, float]:
    """Return the weight of each loss variant. Raises UserError for an unknown one, or a weight that is none."""
    known = METHOD_FACTS[options.method].losses
    weights: dict[str, float] = {}
    given = [options.loss] if isinstance(options.loss, str) else options.loss or known[:1]
    for text in given:
        if not isinstance(text, str):
            raise UserError(f"{option('loss')}: {text!r} is not the name of a loss, such as {known[0]}=0.5.")
        name, _, weight = text.partition("=")
        if name not in known:
            raise UserError(
                f"{option('loss')}: {name!r} is not a loss of {option('method')} {options.method}; "
                f"expected {', '.join(known[:-1])} or {known[-1]}."
            )
        if name in weights:
            raise UserError(f"{option('loss')}: {name} is given twice; give it once, with one weight.")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < LARGEST:
            raise UserError(f"{option('loss')}: {text!r} has no weight above 0; expected such as {name}=0.5.")
    if len(weights) > 1 and options.method == "kto":
        raise UserError(f"{option('loss')}: {option('method')} kto takes one loss, not {len(weights)}.")
    if "exo_pair" in weights and not options.label_smoothing:
        raise UserError(f"{option('loss')} exo_pair needs {option('label_smoothing')} above 0, such as 0.01.")
    return weights


def length_limit(options: LoopOptions, context_tokens: int) -> int:
    """The maximum tokens per row of a run."""
    return row_limit(options.max_length, context_tokens)


def row_limit(max_length: int | None, context_tokens: int) -> int:
    """The maximum tokens per row. Raises UserError if `max_length` exceeds the model's context."""
    if max_length is None:
        return min(context_tokens, DEFAULT_MAX_LENGTH)
    if max_length > context_tokens:
        raise UserError(
            f"{option('max_length')} is {max_length}, but the model's context is {context_tokens} tokens; "
            "use at most that."
        )
    return max_length


def pack_length(lengths: list[int], longest: int) -> int:
    """Tokens per pack: short enough that small data gives MIN_STEPS_PER_EPOCH packs, at least the longest row."""
    share = math.ceil(sum(lengths) / MIN_STEPS_PER_EPOCH)
    return min(longest, max(share, max(lengths)))


def learning_rate(parameters: int, *, is_full: bool = False) -> float:
    """Peak AdamW learning rate for a model of `parameters` weights: for LoRA, or for all weights if `is_full`."""
    for limit, rate in ((5e7, 2e-3), (5e8, 5e-4), (2e9, 3e-4)):
        if parameters < limit:
            return rate if not is_full else rate / 2
    return 2e-4 if not is_full else 2e-5


def complete(
    options: Options,
    *,
    packs: int,
    parameters: int,
    facts: MethodFacts,
    weight_bytes: int = 0,
    is_full: bool = False,
) -> Options:
    """Return the options with every None that the training loop needs replaced by its default for this run."""
    batch = options.batch_size or facts.batch_size
    # larger steps through accumulation, as a larger batch would need memory for all its rows at once
    accumulation = options.gradient_accumulation_steps or max(1, round(packs / batch / MAX_STEPS_PER_EPOCH))
    epochs = options.epochs or facts.epochs
    steps_per_epoch = math.ceil(packs / (batch * accumulation))
    steps = options.max_steps or max(1, math.ceil(epochs * steps_per_epoch))
    checkpointing = options.gradient_checkpointing
    if checkpointing is None and is_full:  # else the memory plan decides per layer
        checkpointing = weight_bytes > CHECKPOINTING_THRESHOLD_BYTES
    return dataclasses.replace(
        options,
        batch_size=batch,
        gradient_accumulation_steps=accumulation,
        epochs=epochs,
        max_steps=steps,
        learning_rate=options.learning_rate
        or facts.learning_rate_share * learning_rate(parameters, is_full=is_full),
        gradient_checkpointing=checkpointing,
        keep_best=options.keep_best
        or options.early_stopping is not None,  # nobody wants the weights it stopped at
        eval_steps=options.eval_steps or max(1, math.ceil(steps / 5)),
        save_steps=options.save_steps or max(1, math.ceil(steps / 10)),
    )
