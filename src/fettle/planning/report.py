"""The plan in figures and in words, and the error with advice if nothing fits."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fettle.checkpoints.dtypes import name_of
from fettle.errors import UserError, option
from fettle.events import Planned
from fettle.files import human_bytes
from fettle.planning.costs import Workload
from fettle.planning.plan import Plan, allowed_policies, least_peak
from fettle.planning.shapes import Shapes
from fettle.recompute.policies import Policy

NAMES = {
    Policy.KEEP: "keep everything",
    Policy.RECOMPUTE_NORMS: "recompute norms",
    Policy.RECOMPUTE_MLP: "recompute norms and MLP",
    Policy.KEEP_ATTENTION: "recompute all but attention",
    Policy.RECOMPUTE: "recompute the layer",
    Policy.OFFLOAD: "recompute the layer, input offloaded to host memory",
}


def rows(plan: Plan) -> list[tuple[str, int]]:
    """Return the parts of the peak as (name, bytes); they add up to the peak."""
    return [
        ("program and libraries", plan.base),
        ("weights", plan.weights),
        ("adapters", plan.adapters),
        ("optimizer", plan.optimizer),
        ("activations", plan.activations),
        ("gradients, head and workspace", plan.workspace),
        *([(f"more during {plan.phase}", plan.beyond_training)] if plan.beyond_training else []),
    ]


def planned(plan: Plan, *, work: Workload, budget: int, longest: int | None = None) -> Planned:
    """Return the plan to report: its figures, the policies and the expected speed."""
    layers = ", ".join(f"{count} {NAMES[policy]}" for policy, count in plan.counts().items())
    limit = f"{100 * plan.share_of_limit:.0f}% of what bare matrix products would allow"
    lines = [
        f"layers: {layers}",
        *_notes(plan.work),
        f"speed: {rounded_seconds(plan.seconds)} per step of {plan.tokens:,} tokens, "
        f"{plan.tokens_per_second:,.0f} tokens/s, {limit}",
    ]
    if longest is not None:
        lines.append(f"longest context that fits: {longest:,} tokens")
    return Planned(_title(work), as_dict(plan, budget=budget, longest=longest), tuple(lines))


def _title(work: Workload) -> str:
    dtype = name_of(work.dtype) + (" with NF4 weights" if work.is_nf4 else "")
    return f"memory on {work.device_type}: rank {work.rank}, {dtype}"


def _notes(work: Workload) -> list[str]:
    """Return lines on memory saved outside the layers."""
    notes = []
    if work.has_offloaded_embedding:
        place = "in host memory" if work.device_type == "cuda" else "memory-mapped from its file"
        notes.append(f"embedding: {place}")
    if work.returns_memory:
        notes.append("heap: freed memory is returned to the system immediately (less memory, slower)")
    return notes


def rounded_seconds(seconds: float) -> str:
    """Return seconds with two significant digits and no exponent: 0.48 s, 1.3 s, 280 s."""
    rounded = float(f"{seconds:.2g}")
    return f"{rounded:,.0f} s" if rounded >= 10 else f"{rounded:g} s"


def as_dict(plan: Plan, *, budget: int, longest: int | None) -> dict[str, Any]:
    """Return the plan as data; bytes and seconds are plain numbers."""
    return {
        "budget_bytes": budget,
        "peak_bytes": plan.peak,
        "memory_bytes": dict(rows(plan)),
        "has_outer_embedding": plan.work.has_offloaded_embedding,
        "returns_memory": plan.work.returns_memory,
        "layers": {policy.name.lower(): count for policy, count in plan.counts().items()},
        "seconds_per_step": plan.seconds,
        "tokens_per_step": plan.tokens,
        "tokens_per_second": plan.tokens_per_second,
        "share_of_limit": plan.share_of_limit,
        "longest_context_tokens": longest,
    }


def refusal(
    shapes: Shapes, work: Workload, allowed: tuple[Policy, ...], *, base: int, budget: int, length_option: str
) -> UserError:
    """Return the error that states the least memory needed, and what each change saves.

    length_option: the option that sets the tokens of a row.
    """
    needed = least_peak(shapes, work, allowed, base)
    advice = []
    for text, changed, policies in _ways_down(shapes, work, allowed, base, budget, length_option):
        saved = needed - least_peak(shapes, changed, policies, base)
        if saved > 0.01 * needed:
            advice.append(f"{text} saves {human_bytes(saved)}")
    ways = f"To need less: {'; '.join(advice)}." if advice else "Use a smaller model."
    return UserError(
        f"{human_bytes(budget)} of memory is too little; this run needs at least {human_bytes(needed)}. {ways}"
    )


def _ways_down(
    shapes: Shapes, work: Workload, allowed: tuple[Policy, ...], base: int, budget: int, length_option: str
) -> Iterator[tuple[str, Workload, tuple[Policy, ...]]]:
    """Yield options that need less memory, with the workload and the allowed policies that they give."""
    if work.batch_size > 1:
        size = work.batch_size // 2
        while size > 1 and least_peak(shapes, work.with_batch_size(size), allowed, base) > budget:
            size //= 2
        yield f"{option('batch_size')} {size}", work.with_batch_size(size), allowed
    if not work.is_nf4:
        yield f"{option('quantization')} nf4", replace(work, is_nf4=True), allowed
    if work.rank > 8:
        yield f"{option('rank')} 8", replace(work, rank=8), allowed
    if work.row_tokens > 256:
        yield f"{option(length_option)} {work.row_tokens // 2}", work.with_tokens(work.tokens // 2), allowed
    if Policy.RECOMPUTE not in allowed:
        text = f"leaving {option('gradient_checkpointing')} to the plan"
        yield text, work, allowed_policies(shapes, work, None)
