"""Training and evaluation mode of a whole model.

`model.training` is the flag of one module, and the modules of one tree may differ: PEFT puts a wrapper in training
mode around a base that stays in evaluation mode. So nothing here reads one flag for the whole tree.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode for the block; afterwards each one has the mode it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
