"""The Triton kernels of rms_norm, rotary and gated_activation against their references in float64."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import GELU
from torch.nn.functional import silu

from fettle.ops import apply_rotary, gated_activation, rms_norm
from fettle.ops.dispatch import uses_triton
from fettle.ops.gated_activation import gated_activation_backward, gated_activation_reference, gelu_tanh
from fettle.ops.rms_norm import rms_norm_reference
from fettle.ops.rotary import apply_rotary_reference

Function = Callable[..., torch.Tensor]


def assert_agree(function: Function, reference: Function, inputs: list[torch.Tensor]) -> None:
    """Outputs and gradients of `function` in float32 against `reference` in float64."""
    assert uses_triton(inputs[0])
    narrow = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = function(*narrow), reference(*wide)
    grad = torch.randn_like(found)
    mine = torch.autograd.grad(found, narrow, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for a, b in zip((found, *mine), (expected, *theirs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


# --- rms_norm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 5, 33), (63, 1), (2, 1100)], ids=str)
def test_rms_norm(kernel_device: str, shape: tuple[int, ...], offset: bool) -> None:
    assert_agree(
        lambda x, weight: rms_norm(x, weight, 0.01, offset=offset),
        lambda x, weight: rms_norm_reference(x, weight, 0.01, offset=offset),
        [torch.randn(shape, device=kernel_device), torch.randn(shape[-1], device=kernel_device)],
    )


@pytest.mark.parametrize(("rows", "hidden"), [(5, 1000), (67, 129)])
def test_rms_norm_sums_the_weight_gradient_over_few_programs(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch, rows: int, hidden: int
) -> None:
    """Each program walks over several tiles of rows, the last of them not full."""
    from fettle.ops.kernels import rms_norm as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, weight = torch.randn(rows, hidden, device=kernel_device), torch.randn(hidden, device=kernel_device)
    assert_agree(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), [x, weight])


def test_rms_norm_of_strided_rows(kernel_device: str) -> None:
    """A slice of a wider row, a transposed input, and a gradient that is one number repeated."""
    wide, weight = torch.randn(6, 50, device=kernel_device), torch.randn(21, device=kernel_device)
    for x in (wide[:, 8:29], torch.randn(21, 6, device=kernel_device).T):
        leaf = x.detach().requires_grad_()
        assert_agree(lambda x: rms_norm(x, weight, 1e-6), lambda x: rms_norm_reference(x, weight, 1e-6), [x])
        (mine,) = torch.autograd.grad(rms_norm(leaf, weight, 1e-6).sum(), leaf)
        (theirs,) = torch.autograd.grad(rms_norm_reference(leaf, weight, 1e-6).sum(), leaf)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# --- rotary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [(1, 2, 2), (3, 10, 10), (9, 10, 4), (2, 7, 6)], ids=str
)
@pytest.mark.parametrize("shared", [False, True], ids=["positions-by-row", "positions-shared"])
def test_rotary(kernel_device: str, heads: int, head_dim: int, rotary_dim: int, shared: bool) -> None:
    cos, sin = torch.randn(2, 1 if shared else 2, 5, rotary_dim, device=kernel_device)
    transposed = torch.randn(2, 5, heads + 1, head_dim, device=kernel_device).transpose(1, 2)
    for x in (torch.randn(2, heads, 5, head_dim, device=kernel_device), transposed[:, 1:]):
        assert_agree(
            lambda x: apply_rotary(x, cos, sin),
            lambda x: apply_rotary_reference(x, cos.double(), sin.double()),
            [x],
        )


def test_rotary_of_nothing(kernel_device: str) -> None:
    x, angle = torch.empty(2, 3, 0, 4, device=kernel_device), torch.empty(2, 0, 4, device=kernel_device)
    assert apply_rotary(x, angle, angle).shape == x.shape


# --- gated_activation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [silu, gelu_tanh], ids=["silu", "gelu-tanh"])
@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 63), (2, 1, 1100)], ids=str)
def test_gated_activation(kernel_device: str, shape: tuple[int, ...], activation: Function) -> None:
    gate, up = 3 * torch.randn(2, *shape, device=kernel_device)
    halves = torch.cat((gate, up), -1).chunk(2, dim=-1)  # as a fused projection leaves them
    for inputs in ([gate, up], list(halves)):
        assert_agree(
            lambda gate, up: gated_activation(gate, up, activation),
            lambda gate, up: gated_activation_reference(gate, up, activation),
            inputs,
        )


@pytest.mark.parametrize("activation_name", ["silu", "gelu_pytorch_tanh"])
def test_gated_activation_gives_its_product_once_more(kernel_device: str, activation_name: str) -> None:
    gate, up, grad = torch.randn(3, 4, 33, device=kernel_device)
    product = gated_activation_backward(grad, gate, up, activation_name)[2]
    activation = silu if activation_name == "silu" else GELU(approximate="tanh")
    torch.testing.assert_close(product, gated_activation_reference(gate, up, activation))
