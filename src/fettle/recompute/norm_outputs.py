"""Outputs that are cheaper to recompute in backward than to keep, such as those of norms."""

from collections.abc import Callable
from typing import Any

import torch


class _Recipe:
    """Recomputes an output once, and holds it until it has been unpacked as many times as it was saved."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        self.function, self.x = function, x.detach()
        self.uses = 0
        self.output: torch.Tensor | None = None

    def make(self) -> torch.Tensor:
        if self.output is None:
            with torch.no_grad():
                self.output = self.function(self.x)
        output, self.uses = self.output, self.uses - 1
        if self.uses <= 0:
            self.output = None
        return output


class RecomputedOutputs(torch.autograd.graph.saved_tensors_hooks):
    """Within the block, saving an output of `run` for backward saves a recipe to recompute it instead of the tensor.

    This saves memory only if the function's input is kept for backward anyway.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        # Outputs stay alive until the block ends, so that an address identifies one tensor.
        self.recipes: dict[int, tuple[torch.Tensor, _Recipe]] = {}

    def __enter__(self) -> "RecomputedOutputs":  # type: ignore[override]
        super().__enter__()  # which itself returns None
        return self

    def __exit__(self, *args: Any) -> None:
        self.recipes.clear()
        super().__exit__(*args)

    def run(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return `function(x)`, to be recomputed in backward."""
        output = function(x)
        self.recipes[output.data_ptr()] = (output, _Recipe(function, x))
        return output

    def _pack(self, tensor: torch.Tensor) -> Any:
        found = self.recipes.get(tensor.data_ptr())
        if found is None or not _is_same_memory(found[0], tensor):
            return tensor
        recipe = found[1]
        recipe.uses += 1
        return recipe, tensor.shape

    @staticmethod
    def _unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        recipe, shape = packed
        output: torch.Tensor = recipe.make()
        return output.view(shape)


def _is_same_memory(output: torch.Tensor, saved: torch.Tensor) -> bool:
    """Return whether `saved`, at the address of `output`, is all of it in another shape: no slice, no transpose."""
    is_whole = saved.numel() == output.numel() and saved.dtype == output.dtype
    return is_whole and saved.is_contiguous() and output.is_contiguous()
