"""Training and evaluation mode of a whole model.

`model.training` is the flag of one module, and the modules of a model may differ: PEFT wraps a base in evaluation mode
in a module in training mode. So every module's flag is saved and restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode within the block, and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training
