"""Per-step overhead that a single-process run can skip.

A model with adapters has about a thousand modules, and PyTorch visits all of them to set a flag or to find or clear
gradients: each walk costs a few milliseconds of Python while the GPU waits. With several processes, sharding replaces
parameters during training, so the walks are needed there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def is_single_process() -> bool:
    """Whether no other process trains the same model."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@contextmanager
def without_module_walks(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block, `model.train` visits the modules only if one is in the other mode, and `model.zero_grad`
    clears only the trained parameters."""
    modules = list(model.modules())  # reading a thousand flags takes 0.05 ms, PyTorch's walk 3 ms

    def train(mode: bool = True) -> nn.Module:
        is_set = all(module.training == mode for module in modules)
        return model if is_set else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    vars(model).update(train=train, zero_grad=zero_grad)  # on this instance, not on its class
    try:
        yield
    finally:
        del vars(model)["train"], vars(model)["zero_grad"]
