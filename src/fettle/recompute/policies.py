"""What of a layer's forward pass is kept for backward: the policies, from most memory to most work.

All give the same losses and gradients. What each keeps, in Phi-3.5's shapes and units of tokens * hidden size:

    KEEP            13.4   everything but the MLP's product, which `lora_mlp` always redoes
    DROP            11.4   all but norm outputs, which are redone from the norms' inputs
    REDO_MLP         6     not the MLP's gate and up either
    KEEP_ATTENTION   2     the layer's input and the attention's result; the projections are redone
    REDO             1     the layer's input
    PARK             0     the layer's input, in host memory

A redone layer runs again in backward (torch.utils.checkpoint), but for its last product: of the MLP only the
input is needed, as `lora_mlp` redoes the rest itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from fettle.ops.attention import KeptAttention
from fettle.ops.lora_mlp import Keep
from fettle.recompute.norm_outputs import RedoableOutputs
from fettle.recompute.offload import parked


class Policy(IntEnum):
    """In order of memory, from most to least."""

    KEEP = 0
    DROP = 1
    REDO_MLP = 2
    KEEP_ATTENTION = 3
    REDO = 4
    PARK = 5


@dataclass(slots=True)
class Keeping:
    """What the parts of a layer may keep in one pass. attention: a place for the attention's result, where
    it is wanted again; is_redone: this pass only brings back what backward needs."""

    mlp: Keep = "gates"
    attention: KeptAttention | None = None
    outputs: RedoableOutputs | None = None
    is_redone: bool = False

    def redoable(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return `function(x)`, which backward will redo instead of finding it saved, where outputs are dropped."""
        return function(x) if self.outputs is None else self.outputs.run(function, x)


class Compute(Protocol):
    """A layer's forward pass."""

    def __call__(self, x: torch.Tensor, keeping: Keeping) -> torch.Tensor: ...


def run_layer(policy: Policy, compute: Compute, x: torch.Tensor) -> torch.Tensor:
    """Return `compute(x, ...)`, with no more kept for backward than the policy allows."""
    if policy == Policy.KEEP:
        return compute(x, Keeping())
    if policy in (Policy.DROP, Policy.REDO_MLP):
        with RedoableOutputs() as outputs:
            return compute(x, Keeping("gates" if policy == Policy.DROP else "input", outputs=outputs))
    attention = KeptAttention() if policy == Policy.KEEP_ATTENTION else None
    keeping = Keeping("input", attention)
    with parked(x) if policy == Policy.PARK else nullcontext():
        output: torch.Tensor = checkpoint(
            *(compute, x, keeping),
            use_reentrant=False,
            preserve_rng_state=not is_capturing(),  # which a graph cannot; it has no dropout
            context_fn=lambda: (nullcontext(), _redoing(keeping)),
        )
    return output


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _redoing(keeping: Keeping) -> Iterator[None]:
    keeping.is_redone = True
    try:
        yield
    finally:
        keeping.is_redone = False
