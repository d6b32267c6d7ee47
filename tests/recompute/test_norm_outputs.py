"""What is saved of a recomputed output is made again only where that gives the same tensor."""

import torch

from fettle.recompute.norm_outputs import RecomputedOutputs


def test_gradients_through_views_of_a_recomputed_output() -> None:
    """In its own shape, in another, in part and transposed."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)

    def total(y: torch.Tensor) -> torch.Tensor:
        return (
            (weight * y).sum()
            + (weight.view(-1) * y.view(-1)).prod()
            + (weight[:2] * y[:2]).sum()
            + (weight * y.T).sum()
        )

    with RecomputedOutputs() as outputs:
        found = torch.autograd.grad(total(outputs.run(torch.sin, x)), weight)
    assert torch.equal(*found, *torch.autograd.grad(total(torch.sin(x)), weight))
