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
    """The LoRA adapters of a model, each as the first layer that it adapts has it; cheap to ask in every step."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: tuple[str, ...] = ()
        self._layers: dict[str, LoraLayer] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(getattr(self._model, "peft_config", ()))

    @property
    def active(self) -> str:
        """The adapter that the model runs with by itself; "" if there is none, or it is switched off."""
        layers = self._first_layers()
        if not layers or next(iter(layers.values())).disable_adapters:
            return ""
        return str(self._model.active_adapter)

    def identity(self) -> Hashable:
        """Changes when an adapter is added, replaced, merged, or switched on or off: recorded graphs are then void."""
        layers = self._first_layers().items()
        return self.active, *((name, layer.merged, id(layer.lora_A[name].weight)) for name, layer in layers)

    def fingerprint(self) -> Hashable:
        """Changes with `identity` and when an adapter is trained: kept keys and values are then void.

        It reads one layer's weights, since their `_version` does not tell: fused optimizers change them without it.
        """
        weights = [layer.lora_B[name].weight.detach() for name, layer in self._first_layers().items()]
        return self.identity(), *(float(weight.double().square().sum()) for weight in weights)

    def _first_layers(self) -> dict[str, LoraLayer]:
        if self._known != self.names:
            self._known, self._layers = self.names, {}
            for module in self._model.modules():
                if isinstance(module, LoraLayer):
                    for name in module.lora_A:
                        self._layers.setdefault(name, module)
        return self._layers
