"""What one process alone may leave out of a step.

A model with adapters has a thousand modules, and PyTorch walks through them all to set a flag, to find gradients
or to clear them: each walk takes a few milliseconds of Python while the GPU waits. Where parameters are shared
out among processes they are replaced on the way, so there the walks stay.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def is_alone() -> bool:
    """Whether no other process trains the same model."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@contextmanager
def skipped_walks(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block `train` walks through the model only if some module is in the other mode, and `zero_grad`
    clears only what is trained."""
    modules = list(model.modules())  # to read a thousand flags takes 0.05 ms, PyTorch's walk 3 ms

    def train(mode: bool = True) -> nn.Module:
        is_set = all(module.training == mode for module in modules)
        return model if is_set else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    vars(model).update(train=train, zero_grad=zero_grad)  # of this one model, not of its class
    try:
        yield
    finally:
        del vars(model)["train"], vars(model)["zero_grad"]
