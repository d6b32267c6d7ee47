"""The plan: which policy each layer gets, so that the step is as fast as possible within the memory budget.

Exhaustive search over the layer counts of at most three policies. Layers that keep least come first in the model:
backward reaches them last, after most kept activations are freed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fettle.planning.costs import Runs, StepMemory, Workload, runs_whole_mlp, trained_bytes, weight_bytes
from fettle.planning.phases import other_phases
from fettle.planning.rates import Rates
from fettle.planning.shapes import Shapes
from fettle.planning.step_time import StepTime, floor_seconds
from fettle.recompute.policies import Policy

NEAR = 1.02
"""Plans whose times are within this factor count as equally fast: the probe's timings vary as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The policies of a run, and its memory and time.

    policies: one per layer, first layer first. work: the workload, with the variant chosen (`variants`). In bytes:
    base, the process without a model; weights; adapters; optimizer; activations, what the layers keep for backward;
    workspace, what the peak of a step adds: gradients and the working memory of the head or a layer; beyond_training,
    what `phase`, the phase with the highest peak, needs beyond that of a step. seconds and tokens: per optimizer step.
    share_of_limit: the time of the unavoidable matrix products (`floor_seconds`) as a fraction of the step's.
    """

    policies: tuple[Policy, ...]
    work: Workload
    base: int
    weights: int
    adapters: int
    optimizer: int
    activations: int
    workspace: int
    phase: str
    beyond_training: int
    seconds: float
    tokens: int
    share_of_limit: float

    @property
    def peak(self) -> int:
        """Peak bytes of the run."""
        return self.training + self.beyond_training

    @property
    def training(self) -> int:
        """Peak bytes of a step."""
        fixed = self.base + self.weights + self.adapters + self.optimizer
        return fixed + self.activations + self.workspace

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def counts(self) -> dict[Policy, int]:
        """Return how many layers have each policy."""
        return {policy: n for policy in Policy if (n := self.policies.count(policy))}


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything a plan is made from.

    accumulation: batches per optimizer step. base: bytes of the process without a model. reached: peak bytes of the
    process so far, while it read its data and planned.
    """

    shapes: Shapes
    rates: Rates
    accumulation: int = 1
    base: int = 0
    reached: int = 0

    def best(self, work: Workload, budget: int, allowed: tuple[Policy, ...]) -> Plan | None:
        """Return the fastest plan whose steps stay within `budget` bytes, or None if there is none.

        Of equally fast plans (NEAR), the one that keeps most. Other phases do not depend on the policies.
        """
        fitting = []  # (seconds, bytes kept, variant, runs)
        for variant in variants(self.shapes, work):
            fixed, memory = fixed_bytes(self.shapes, variant, self.base), StepMemory.of(self.shapes, variant)
            time = StepTime.of(self.shapes, self.rates, variant)
            for runs in _choices(self.shapes.layers, allowed):
                kept, peak = memory.peak(runs)
                if fixed + peak <= budget:
                    fitting.append((time.seconds(runs, self.accumulation), kept, variant, runs))
        limit = NEAR * min((seconds for seconds, *_ in fitting), default=0.0)
        near = (each for each in fitting if each[0] <= limit)
        best = max(near, key=lambda each: (each[1], -each[0]), default=None)
        if best is None:
            return None
        policies = tuple(policy for policy, count in best[3] for _ in range(count))
        return self.plan(best[2], policies)

    def longest(self, work: Workload, budget: int, allowed: tuple[Policy, ...]) -> int:
        """Return the most tokens per document that fit into `budget` bytes with the leanest plan, up to the context."""
        low, high = 0, self.shapes.context
        while low < high:
            middle = (low + high + 1) // 2
            longer = work.with_tokens(work.documents * middle)
            fits = least_peak(self.shapes, longer, allowed, self.base) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def plan(self, work: Workload, policies: tuple[Policy, ...]) -> Plan:
        """Return the memory and time of these policies, one per layer."""
        runs = [(policy, len(list(same))) for policy, same in itertools.groupby(policies)]
        adapters, _, optimizer = trained_bytes(self.shapes, work)
        kept, peak = StepMemory.of(self.shapes, work).peak(runs)
        seconds = StepTime.of(self.shapes, self.rates, work).seconds(runs, self.accumulation)
        training = fixed_bytes(self.shapes, work, self.base) + peak
        phases = other_phases(self.shapes, work, self.base) | {"planning": self.reached, "training": training}
        phase = max(phases, key=lambda name: (phases[name], name == "training"))
        return Plan(
            policies=policies,
            work=work,
            base=self.base,
            weights=weight_bytes(self.shapes, work),
            adapters=adapters,
            optimizer=optimizer,
            activations=kept,
            workspace=peak - kept,
            phase=phase,
            beyond_training=phases[phase] - training,
            seconds=seconds,
            tokens=self.accumulation * work.tokens,
            share_of_limit=self.accumulation * floor_seconds(self.shapes, self.rates, work) / seconds,
        )


def fixed_bytes(shapes: Shapes, work: Workload, base: int) -> int:
    """Return the bytes held throughout a run's steps. base: bytes of the process without a model."""
    adapters, _, optimizer = trained_bytes(shapes, work)
    return base + weight_bytes(shapes, work) + adapters + optimizer


def variants(shapes: Shapes, work: Workload) -> list[Workload]:
    """Return ways to run the same workload, lowest memory last.

    On a CPU freed memory may be returned to the system; on a GPU an untied embedding may be offloaded.
    """
    if work.device_type == "cpu":
        return [work, replace(work, returns_memory=True)]
    return [work, replace(work, has_offloaded_embedding=True)] if shapes.embedding else [work]


def least_peak(shapes: Shapes, work: Workload, allowed: tuple[Policy, ...], base: int) -> int:
    """Return the lowest peak bytes of all plans, found without timings.

    It has one policy for all layers or, on a GPU, another one for the last layer, whose backward runs while most is
    kept.
    """
    peaks = []
    for variant in variants(shapes, work):
        fixed, memory = fixed_bytes(shapes, variant, base), StepMemory.of(shapes, variant)
        for most, last in itertools.product(allowed, repeat=2):
            runs = [(most, shapes.layers - 1), (last, 1)]
            peaks.append(fixed + memory.peak([(policy, count) for policy, count in runs if count])[1])
    return max([min(peaks), *other_phases(shapes, work, base).values()])


def allowed_policies(
    shapes: Shapes, work: Workload, gradient_checkpointing: bool | None
) -> tuple[Policy, ...]:
    """Return the policies that the model, the device and the user allow; OFFLOAD needs a GPU.

    gradient_checkpointing: True allows only policies that recompute the layer, False none that recomputes more than
    norms, None all.
    """
    policies = [Policy.KEEP, Policy.RECOMPUTE_NORMS]
    if gradient_checkpointing is not False:
        policies += [Policy.RECOMPUTE_MLP] if runs_whole_mlp(shapes, work) else []
        policies += [Policy.KEEP_ATTENTION, Policy.RECOMPUTE]
        policies += [Policy.OFFLOAD] if work.device_type == "cuda" else []
    if gradient_checkpointing:
        policies = [policy for policy in policies if policy.is_recomputed]
    return tuple(policies)


def _choices(layers: int, allowed: tuple[Policy, ...]) -> Iterator[Runs]:
    """Yield all assignments of at most three policies by layer count; those that keep least come first in the model."""
    kinds = [policy for policy in reversed(Policy) if policy in allowed]
    for chosen in itertools.combinations(kinds, min(3, len(kinds))):
        for cuts in itertools.combinations_with_replacement(range(layers + 1), len(chosen) - 1):
            counts = (last - first for first, last in itertools.pairwise((0, *cuts, layers)))
            yield [(policy, count) for policy, count in zip(chosen, counts, strict=True) if count]
