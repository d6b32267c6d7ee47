"""How long a training step takes, from the device's rates and the policies of the layers."""

import itertools
from dataclasses import dataclass

from fettle.planning.costs import Runs, Workload, trained_bytes
from fettle.planning.rates import Rates, visible_pairs
from fettle.planning.shapes import Shapes
from fettle.recompute.policies import Policy

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


@dataclass(frozen=True, slots=True)
class StepTime:
    """What the seconds of a step are computed from, for any choice of policies.

    layers: by policy, seconds of the first 0, 1, 2, ... layers with one batch. head: of one batch.
    """

    work: Workload
    layers: dict[Policy, list[float]]
    head: float
    embedding: float
    update: float

    @classmethod
    def of(cls, shapes: Shapes, rates: Rates, work: Workload) -> "StepTime":
        """Sum each policy once: a search asks for thousands of combinations."""
        length, is_cuda = work.tokens // work.documents, work.device_type == "cuda"
        pair = rates.attention_of(length)
        pairs = [work.documents * visible_pairs(length, window) for window in shapes.windows]
        layers = {
            policy: [0.0, *itertools.accumulate(line.at(work.tokens) + n * pair.of(policy) for n in pairs)]
            for policy, line in rates.layers.items()
        }
        row = OUTER_SECONDS * shapes.hidden * work.item if work.has_outer_embedding and is_cuda else 0.0
        update = rates.update * trained_bytes(shapes, work)[2] / 8
        update += TENSOR_SECONDS[work.device_type] * shapes.adapter_tensors(work.targets)
        update += STEP_SECONDS[work.device_type]
        return cls(work, layers, rates.head * work.tokens, row * work.tokens, update)

    def seconds(self, runs: Runs, accumulation: int) -> float:
        """Of a step of `accumulation` batches."""
        total, done = self.head, 0
        for policy, count in runs:
            first = self.layers[policy]
            total += first[done + count] - first[done]
            done += count
        # these LayerGraphs refuses
        is_eager = self.work.has_dropout or any(policy.is_offloaded for policy, _ in runs)
        if self.work.device_type == "cuda" and is_eager:
            total = max(total, EAGER_SECONDS * done)
        if self.work.returns_memory:
            total *= RETURN_FACTOR
        return accumulation * (total + self.embedding) + self.update


def floor_seconds(shapes: Shapes, rates: Rates, work: Workload) -> float:
    """Products that cannot be avoided, at the speed of bare products: forward and input gradients."""
    weights = shapes.layers * shapes.layer_weights + shapes.head
    length = work.tokens // work.documents
    pairs = sum(work.documents * visible_pairs(length, window) for window in shapes.windows)
    attention = pairs * 4 * shapes.query * 3.5
    return float(2 * weights * work.tokens * 2 + attention) / rates.products
