"""The time of a training step, from the device's rates and the policies of the layers."""

import itertools
from dataclasses import dataclass

from fettle.planning.costs import Runs, Workload, trained_bytes
from fettle.planning.rates import Rates, visible_pairs
from fettle.planning.shapes import Shapes
from fettle.recompute.policies import Policy

STEP_SECONDS = {"cpu": 0.0, "cuda": 0.01}
"""Python overhead of the trainer per step, while the GPU waits."""
TENSOR_SECONDS = {"cpu": 7.5e-5, "cuda": 0.0}
"""Overhead of gradient clipping and AdamW per trained tensor. Measured: with 28, 70 and 168 tensors, a step of tiny
models took 1.8, 4.5 and 15 ms more than its layers. On a GPU a few launches handle all tensors."""
EAGER_SECONDS = 0.0135
"""Time to launch the kernels of one layer without a CUDA graph, during which the GPU waits; measured on an H100."""
EMBEDDING_SECONDS = 2e-10
"""Seconds per byte of token embeddings copied from host memory to the GPU."""
RETURN_FACTOR = 1.4
"""Slowdown of a step if freed memory is returned to the system immediately: new pages are zeroed for each tensor."""
LEAST_FORWARD, FORWARD_HEAD = 0.3, 0.5
"""A pass without gradient: at least this share of the time of a layer that keeps everything, and of the head's."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """The seconds of a step's parts, for any choice of policies.

    layers: by policy, the cumulative seconds of the first 0, 1, 2, ... layers for one batch. head: seconds per batch of
    the head, and of passes without gradient; embedding: of the embedding. update: seconds of the optimizer per step.
    """

    work: Workload
    layers: dict[Policy, list[float]]
    head: float
    embedding: float
    update: float

    @classmethod
    def of(cls, shapes: Shapes, rates: Rates, work: Workload) -> "StepTime":
        """Sum each policy's layers once: a search tries thousands of combinations."""
        length, is_cuda = work.tokens // work.documents, work.device_type == "cuda"
        pair = rates.attention_of(length)
        pairs = [work.documents * visible_pairs(length, window) for window in shapes.windows]
        layers = {
            policy: [0.0, *itertools.accumulate(line.at(work.tokens) + n * pair.of(policy) for n in pairs)]
            for policy, line in rates.layers.items()
        }
        # a recomputed layer runs forward once more than one that is kept
        twice, once = (layers[policy][-1] for policy in (Policy.RECOMPUTE, Policy.KEEP))
        forward = max(twice - once, LEAST_FORWARD * once) + FORWARD_HEAD * rates.head * work.tokens
        copies_embedding = work.has_offloaded_embedding and is_cuda
        row = EMBEDDING_SECONDS * shapes.hidden * work.item if copies_embedding else 0.0
        update = rates.update * trained_bytes(shapes, work)[2] / 8
        update += TENSOR_SECONDS[work.device_type] * shapes.adapter_tensors(work.targets)
        update += STEP_SECONDS[work.device_type]
        head = rates.head * work.tokens + work.forward_passes * forward
        return cls(work, layers, head, row * work.tokens, update)

    def seconds(self, runs: Runs, accumulation: int) -> float:
        """Return the seconds of an optimizer step of `accumulation` batches."""
        total, done = self.head, 0
        for policy, count in runs:
            first = self.layers[policy]
            total += first[done + count] - first[done]
            done += count
        # LayerGraphs supports neither of these
        is_eager = self.work.has_dropout or any(policy.is_offloaded for policy, _ in runs)
        if self.work.device_type == "cuda" and is_eager:
            total = max(total, EAGER_SECONDS * done)
        if self.work.returns_memory:
            total *= RETURN_FACTOR
        return accumulation * (total + self.embedding) + self.update


def floor_seconds(shapes: Shapes, rates: Rates, work: Workload) -> float:
    """Return the seconds of one batch's unavoidable products: forward and input gradients, at `rates.products`."""
    weights = shapes.layers * shapes.layer_weights + shapes.head
    length = work.tokens // work.documents
    pairs = sum(work.documents * visible_pairs(length, window) for window in shapes.windows)
    attention = pairs * 4 * shapes.query * 3.5  # 2 products forward, 5 in backward
    return float(2 * weights * work.tokens * 2 + attention) / rates.products
