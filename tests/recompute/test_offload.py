"""Parked tensors come back unchanged; on a CPU they are copies in the same memory."""

import torch

from fettle.recompute.offload import offloaded


def run(x: torch.Tensor, weight: torch.Tensor, *, is_parked: bool) -> tuple[torch.Tensor, ...]:
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    if is_parked:
        with offloaded(x):
            out = (x @ weight).tanh() + x.square()
    else:
        out = (x @ weight).tanh() + x.square()
    out.sum().backward()
    assert x.grad is not None and weight.grad is not None
    return out.detach(), x.grad, weight.grad


def test_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 8), torch.randn(8, 8)
    plain, found = (run(x, weight, is_parked=is_parked) for is_parked in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_x_is_saved_as_a_copy_and_other_tensors_as_themselves() -> None:
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with offloaded(x):
        out = x @ weight
    saved_x, saved_weight = out.grad_fn._saved_self, out.grad_fn._saved_mat2  # type: ignore[union-attr]
    assert torch.equal(saved_x, x) and saved_x.data_ptr() != x.data_ptr()
    assert saved_weight.data_ptr() == weight.data_ptr()


def test_several_layers_one_after_the_other() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(6, 6, requires_grad=True) for _ in range(4)]
    gradients = []
    for is_parked in (False, True):
        x = start = torch.ones(3, 6, requires_grad=True)
        for weight in weights:
            if is_parked:
                with offloaded(x):
                    x = (x @ weight).sin()
            else:
                x = (x @ weight).sin()
        gradients.append(torch.autograd.grad(x.sum(), [start, *weights]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
