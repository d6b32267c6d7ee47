"""The gate of SwiGLU and GeGLU (Shazeer, 2020, arXiv 2002.05202, equation 6)."""

from collections.abc import Callable

import torch


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return `activation(gate) * up`. gate, up: (..., intermediate)."""
    return activation(gate) * up
