"""What a layer keeps of its forward pass for backward: the policies, from most memory to most recomputation.

All give the same losses and gradients. What each keeps, for Phi-3.5's shapes, in units of tokens * hidden size:

    KEEP             13.4   everything but the MLP's product, which `lora_mlp` always recomputes
    RECOMPUTE_NORMS  11.4   all but norm outputs, which are recomputed from the norms' inputs
    RECOMPUTE_MLP     6     the MLP's gate and up projections are recomputed as well
    KEEP_ATTENTION    2     the layer's input and the attention's result; the projections are recomputed
    RECOMPUTE         1     the layer's input
    OFFLOAD           0     the layer's input, in host memory

A recomputed layer runs again in backward (torch.utils.checkpoint), except for its last product: the MLP needs only its
input, because `lora_mlp` recomputes the rest itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from fettle.ops.attention import KeptAttention
from fettle.ops.lora_mlp import Keep
from fettle.recompute.norm_outputs import RecomputedOutputs
from fettle.recompute.offload import offloaded


@dataclass(frozen=True)
class Kept:
    """What a layer keeps for its backward pass.

    norms: the outputs of its norms. gates: the outputs of the MLP's gate and up projections. attention: the attention's
    result. is_recomputed: the layer's forward pass runs again in backward. is_offloaded: its input is in host memory.
    """

    norms: bool
    gates: bool
    attention: bool
    is_recomputed: bool = False
    is_offloaded: bool = False


class Policy(Kept, Enum):
    """The policies, in order of kept memory, from most to least."""

    KEEP = True, True, True
    RECOMPUTE_NORMS = False, True, True
    RECOMPUTE_MLP = False, False, True
    KEEP_ATTENTION = False, False, True, True
    RECOMPUTE = False, False, False, True
    OFFLOAD = False, False, False, True, True


@dataclass(slots=True)
class Keeping:
    """What the parts of a layer may keep in one pass.

    mlp: what `lora_mlp` keeps. attention: holds the attention's result for the recomputation, None if it is recomputed
    too. outputs: collects norm outputs to recompute, None if they are kept. is_recomputing: this pass runs in backward,
    only to restore what backward needs.
    """

    mlp: Keep = "gates"
    attention: KeptAttention | None = None
    outputs: RecomputedOutputs | None = None
    is_recomputing: bool = False

    def recomputed(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return `function(x)`; unless outputs are kept, backward recomputes it."""
        return function(x) if self.outputs is None else self.outputs.run(function, x)


class Compute(Protocol):
    """A layer's forward pass."""

    def __call__(self, x: torch.Tensor, keeping: Keeping) -> torch.Tensor: ...


def run_layer(policy: Policy, compute: Compute, x: torch.Tensor) -> torch.Tensor:
    """Return `compute(x, ...)`, with no more kept for backward than the policy allows."""
    if not policy.is_recomputed:
        mlp: Keep = "gates" if policy.gates else "input"
        if policy.norms:
            return compute(x, Keeping(mlp))
        with RecomputedOutputs() as outputs:
            return compute(x, Keeping(mlp, outputs=outputs))
    keeping = Keeping("input", KeptAttention() if policy.attention else None)
    with offloaded(x) if policy.is_offloaded else nullcontext():
        output: torch.Tensor = checkpoint(
            *(compute, x, keeping),
            use_reentrant=False,
            preserve_rng_state=not is_capturing(),  # a CUDA graph cannot; models with dropout run without
            context_fn=lambda: (nullcontext(), _recomputing(keeping)),
        )
    return output


def is_capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _recomputing(keeping: Keeping) -> Iterator[None]:
    keeping.is_recomputing = True
    try:
        yield
    finally:
        keeping.is_recomputing = False
