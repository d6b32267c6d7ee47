"""The plan: which policy each layer gets, so that the step is fastest within the budget.

Exact search: all ways to give the layers at most three policies by counts. Layers that are redone come first,
as backward reaches them last, when most of what was kept is gone.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fettle.memory.costs import (
    Workload,
    peak_of_policies,
    runs_whole_mlp,
    trained_bytes,
    weight_bytes,
)
from fettle.memory.phases import other_phases
from fettle.memory.policies import Policy
from fettle.memory.rates import Rates, visible_pairs
from fettle.memory.shapes import Shapes

STEP_SECONDS = {"cpu": 0.0, "cuda": 0.01}
"""What the trainer itself takes for a step, in Python, while the GPU waits."""
TENSOR_SECONDS = {"cpu": 7.5e-5, "cuda": 0.0}
"""What clipping and AdamW take for each trained tensor, however small: of 28, 70 and 168, a step of tiny models took
1.8, 4.5 and 15 ms more than its layers. On a GPU all tensors go in a few launches."""
EAGER_SECONDS = 0.0135
"""What Python takes to launch a layer's kernels in a step without a CUDA graph, on one H100; the GPU waits for it."""
OUTER_SECONDS = 2e-10
"""A byte of a token's embedding from the host's memory to the GPU."""
RETURN_FACTOR = 1.4
"""A step is so much longer where freed memory goes back to the system at once: every tensor's pages are zeroed anew."""
NEAR = 1.02
"""Plans whose seconds are this close are taken as equally fast: the probe's timings vary as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """policies: of each layer. work: what was asked for, and where its memory is. Bytes: activations are what the
    layers keep for backward; workspace is what comes on top at the worst moment: gradients, the head or a layer at
    work. base: the process without a model."""

    policies: tuple[Policy, ...]
    work: Workload
    base: int
    weights: int
    adapters: int
    optimizer: int
    activations: int
    workspace: int
    phase: str
    other: int
    seconds: float
    tokens: int
    share_of_limit: float

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the run."""
        return self.training + self.other

    @property
    def training(self) -> int:
        """Bytes at the worst moment of a step."""
        fixed = self.base + self.weights + self.adapters + self.optimizer
        return fixed + self.activations + self.workspace

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def counts(self) -> dict[Policy, int]:
        """How many layers have each policy."""
        return {policy: n for policy in Policy if (n := self.policies.count(policy))}


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything a plan is made from. accumulation: batches a step; base: bytes of the process without a model;
    reached: the most that the process has needed already, while it read its data and planned."""

    shapes: Shapes
    rates: Rates
    accumulation: int = 1
    base: int = 0
    reached: int = 0

    def best(self, work: Workload, budget: int, allowed: tuple[Policy, ...]) -> Plan | None:
        """The fastest plan whose steps stay within `budget` bytes, or None; of equally fast ones that which keeps most.
        What other phases need hangs on no policy."""
        fitting = [plan for plan in self._plans(work, allowed) if plan.training <= budget]
        limit = NEAR * min((plan.seconds for plan in fitting), default=0.0)
        near = (plan for plan in fitting if plan.seconds <= limit)
        return max(near, key=lambda plan: (plan.activations, -plan.seconds), default=None)

    def longest(self, work: Workload, budget: int, allowed: tuple[Policy, ...]) -> int:
        """The most tokens of each document that fit the budget with the leanest policy, at most the context."""
        low, high = 0, self.shapes.context
        while low < high:
            middle = (low + high + 1) // 2
            longer = work.with_tokens(work.documents * middle)
            fits = least_peak(self.shapes, longer, allowed, self.base) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _plans(self, work: Workload, allowed: tuple[Policy, ...]) -> Iterator[Plan]:
        for variant in variants(self.shapes, work):
            for policies in _choices(self.shapes.layers, allowed):
                yield self.plan(variant, policies)

    def plan(self, work: Workload, policies: tuple[Policy, ...]) -> Plan:
        """What these policies cost."""
        adapters, _, optimizer = trained_bytes(self.shapes, work)
        kept, peak = peak_of_policies(self.shapes, work, list(policies))
        seconds = self._seconds(work, policies)
        weights = weight_bytes(self.shapes, work)
        training = self.base + weights + adapters + optimizer + peak
        phases = other_phases(self.shapes, work, self.base) | {"planning": self.reached, "training": training}
        phase = max(phases, key=lambda name: (phases[name], name == "training"))
        return Plan(
            policies=policies,
            work=work,
            base=self.base,
            weights=weights,
            adapters=adapters,
            optimizer=optimizer,
            activations=kept,
            workspace=peak - kept,
            phase=phase,
            other=phases[phase] - training,
            seconds=seconds,
            tokens=self.accumulation * work.tokens,
            share_of_limit=self.accumulation * self._floor_seconds(work) / seconds,
        )

    def _seconds(self, work: Workload, policies: tuple[Policy, ...]) -> float:
        rates, total = self.rates, 0.0
        length = work.tokens // work.documents
        pair = rates.attention_of(length)
        for policy, window in zip(policies, self.shapes.windows, strict=True):
            pairs = work.documents * visible_pairs(length, window)
            total += rates.layers[policy].at(work.tokens) + pairs * pair.of(policy)
        total += rates.head * work.tokens
        is_eager = work.has_dropout or Policy.PARK in policies  # as LayerGraphs refuses
        if work.device_type == "cuda" and is_eager:
            total = max(total, EAGER_SECONDS * len(policies))
        if work.returns_memory:
            total *= RETURN_FACTOR
        if work.has_outer_embedding and work.device_type == "cuda":
            total += OUTER_SECONDS * work.tokens * self.shapes.hidden * work.item
        update = rates.update * trained_bytes(self.shapes, work)[2] / 8
        update += TENSOR_SECONDS[work.device_type] * self.shapes.adapter_tensors(work.targets)
        return self.accumulation * total + update + STEP_SECONDS[work.device_type]

    def _floor_seconds(self, work: Workload) -> float:
        """Products that cannot be avoided, at the speed of bare products: forward and input gradients."""
        s = self.shapes
        weights = s.layers * s.layer_weights + s.head
        pairs = sum(work.documents * visible_pairs(work.tokens // work.documents, w) for w in s.windows)
        attention = pairs * 4 * s.query * 3.5
        return float(2 * weights * work.tokens * 2 + attention) / self.rates.products


def variants(shapes: Shapes, work: Workload) -> list[Workload]:
    """Ways to hold the same memory, the leanest last."""
    if work.device_type == "cpu":
        return [work, replace(work, returns_memory=True)]
    return [work, replace(work, has_outer_embedding=True)] if shapes.embedding else [work]


def least_peak(shapes: Shapes, work: Workload, allowed: tuple[Policy, ...], base: int) -> int:
    """The lowest peak of all plans, found without timings: one policy for all layers has it or, on a GPU, with another
    for the last, at whose turn most is kept."""
    peaks = []
    for variant in variants(shapes, work):
        adapters, _, optimizer = trained_bytes(shapes, variant)
        fixed = base + weight_bytes(shapes, variant) + adapters + optimizer
        for most, last in itertools.product(allowed, repeat=2):
            policies = [most] * (shapes.layers - 1) + [last]
            peaks.append(fixed + peak_of_policies(shapes, variant, policies)[1])
    return max([min(peaks), *other_phases(shapes, work, base).values()])


def allowed_policies(
    shapes: Shapes, work: Workload, gradient_checkpointing: bool | None
) -> tuple[Policy, ...]:
    """What the model, the device and the user leave to choose from. Parking needs a host beside the device."""
    policies = [Policy.KEEP, Policy.DROP]
    if gradient_checkpointing is not False:
        policies += [Policy.REDO_MLP] if runs_whole_mlp(shapes, work) else []
        policies += [Policy.KEEP_ATTENTION, Policy.REDO]
        policies += [Policy.PARK] if work.device_type == "cuda" else []
    if gradient_checkpointing:
        policies = [policy for policy in policies if policy >= Policy.KEEP_ATTENTION]
    return tuple(policies)


def _choices(layers: int, allowed: tuple[Policy, ...]) -> Iterator[tuple[Policy, ...]]:
    """All assignments by counts of at most three policies, the leanest first."""
    kinds = sorted(allowed, reverse=True)
    for chosen in itertools.combinations(kinds, min(3, len(kinds))):
        for cuts in itertools.combinations_with_replacement(range(layers + 1), len(chosen) - 1):
            bounds = itertools.pairwise((0, *cuts, layers))
            yield tuple(
                p for p, (first, last) in zip(chosen, bounds, strict=True) for _ in range(last - first)
            )
