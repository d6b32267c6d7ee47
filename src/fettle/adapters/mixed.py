"""Several adapters in one pass: which rows use which, and whether a model's adapters have changed."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn


@dataclass(frozen=True, slots=True)
class MixedAdapters:
    """Which adapter each row of a pass uses. rows: (T,), indices into `names`; -1 for the base alone."""

    names: tuple[str, ...]
    rows: torch.Tensor


_current: ContextVar[MixedAdapters | None] = ContextVar("mixed adapters", default=None)


@contextmanager
def mixed_adapters(mixed: MixedAdapters | None) -> Iterator[None]:
    """Run the LoRA layers with an adapter per row, without gradients; None: with the active adapter."""
    token = _current.set(mixed)
    try:
        yield
    finally:
        _current.reset(token)


def current_mixed() -> MixedAdapters | None:
    """Return which adapters the rows of this pass use; None: all of them the active one."""
    return _current.get()


class ModelAdapters:
    """The LoRA adapters of a model, as its first adapted layer has them; cheap to ask in every step."""

    def __init__(self, model: nn.Module) -> None:
        self._layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)

    @property
    def names(self) -> tuple[str, ...]:
        return () if self._layer is None else tuple(self._layer.lora_A)

    @property
    def active(self) -> str:
        """The adapter that the model runs with by itself; "" if there is none, or it is switched off."""
        layer = self._layer
        is_off = layer is None or layer.disable_adapters or not layer.active_adapters
        return "" if layer is None or is_off else str(layer.active_adapters[0])

    def identity(self) -> Hashable:
        """Changes when an adapter is added, replaced, merged, or switched on or off: recorded graphs are then void."""
        layer = self._layer
        if layer is None:
            return None
        return self.active, layer.merged, *((name, id(a.weight)) for name, a in layer.lora_A.items())

    def fingerprint(self) -> Hashable:
        """Changes with `identity` and when an adapter is trained: kept keys and values are then void.

        It reads one layer's weights, since their `_version` does not tell: fused optimizers change them without it.
        """
        if self._layer is None:
            return None
        weights = [each.weight.detach() for each in self._layer.lora_B.values()]
        return self.identity(), *(float(weight.double().square().sum()) for weight in weights)
