"""rms_norm, rotary and gated_activation against their formulas written out in float64, at odd sizes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fettle.ops import apply_rotary, gated_activation, rms_norm
from fettle.ops.gated_activation import gated_activation_reference, gelu_tanh
from fettle.ops.rms_norm import rms_norm_reference
from fettle.ops.rotary import apply_rotary_reference

Function = Callable[..., torch.Tensor]


def assert_same(
    function: Function, formula: Function, inputs: list[torch.Tensor], rtol: float = 1e-5
) -> None:
    """Outputs and input gradients of `function` in the inputs' dtype against `formula` in float64."""
    narrow = [x.detach().clone().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = function(*narrow), formula(*wide)
    grad = torch.randn_like(expected)
    found.backward(grad.to(found.dtype))
    expected.backward(grad.to(found.dtype).double())
    assert found.dtype == inputs[0].dtype
    assert_near(found, expected, rtol)
    for x, x_wide in zip(narrow, wide, strict=True):
        assert x.grad is not None and x_wide.grad is not None
        assert_near(x.grad, x_wide.grad, rtol)


def assert_near(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """Relative to the largest value: single entries may cancel."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < rtol, f"{error:.1e}"


def test_the_poison_works() -> None:
    assert torch.empty(1000).isnan().all()


# --- rms_norm ----------------------------------------------------------------------------------------------

EPS = 0.01  # large, so that a misplaced one shows


def rms_norm_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    mean = sum(x[..., i] ** 2 for i in range(x.shape[-1])) / x.shape[-1]
    return x / torch.sqrt(mean + EPS)[..., None] * weight


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 33), (63, 1)], ids=str)
@pytest.mark.parametrize("offset", [False, True], ids=["plain", "offset"])
def test_rms_norm(shape: tuple[int, ...], offset: bool) -> None:
    assert_same(
        lambda x, w: rms_norm(x, w, EPS, offset=offset),
        lambda x, w: rms_norm_formula(x, w + 1 if offset else w),
        [torch.randn(shape) * 0.3, torch.randn(shape[-1])],
    )


@pytest.mark.parametrize("offset", [False, True], ids=["plain", "offset"])
def test_rms_norm_in_bf16_rounds_only_its_result(offset: bool) -> None:
    x, weight = torch.randn(9, 33).bfloat16(), torch.randn(33).bfloat16()
    found = rms_norm(x, weight, EPS, offset=offset)
    expected = rms_norm_formula(x.double(), weight.double() + 1 if offset else weight.double())
    assert found.dtype == torch.bfloat16
    roundings = 1 if offset else 2  # without an offset the normalised x is rounded before the product
    relative = ((found.double() - expected) / expected).abs().max()
    assert relative < roundings * 2**-8 * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stock", [LlamaRMSNorm, Gemma2RMSNorm])
def test_rms_norm_rounds_where_stock_does(stock: type, dtype: torch.dtype) -> None:
    """Bit for bit: in narrow types the order of product and rounding is part of a model."""
    norm = stock(63, eps=EPS).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 63).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight, EPS, offset=stock is Gemma2RMSNorm), norm(x))


def test_rms_norm_of_large_fp16_values_does_not_overflow() -> None:
    x = torch.full((2, 33), 3e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(x, torch.ones(33).half(), 1e-6), torch.ones(2, 33).half())


def test_rms_norm_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    rms_norm(x, torch.ones(5), 1e-6).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# --- rotary ------------------------------------------------------------------------------------------------


def angles_of(positions: list[list[int]], rotary_dim: int) -> torch.Tensor:
    """(batch, tokens, rotary_dim / 2)"""
    rates = torch.tensor([100.0 ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])
    return torch.tensor(positions)[..., None] * rates


def rotary_formula(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Channel i and i + n are the real and imaginary part of a number that is turned by angle i."""
    n = angles.shape[-1]
    turned = torch.complex(x[..., :n], x[..., n : 2 * n]) * torch.polar(
        torch.ones_like(angles.double()), angles.double()
    ).unsqueeze(1)
    return torch.cat((turned.real, turned.imag, x[..., 2 * n :]), dim=-1)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (10, 10), (10, 4), (7, 6)])
def test_rotary(head_dim: int, rotary_dim: int) -> None:
    angles = angles_of([[0, 1, 2, 3, 4], [7, 0, 0, 1, 90]], rotary_dim)
    cos, sin = (torch.cat((f, f), dim=-1) for f in (angles.cos(), angles.sin()))
    assert_same(
        lambda x: apply_rotary(x, cos, sin),
        lambda x: rotary_formula(x, angles),
        [torch.randn(2, 3, 5, head_dim)],
    )


def test_rotary_keeps_bf16() -> None:
    angles = angles_of([[0, 1, 2]], 4)
    cos, sin = (torch.cat((f, f), dim=-1).bfloat16() for f in (angles.cos(), angles.sin()))
    assert apply_rotary(torch.randn(1, 2, 3, 6).bfloat16(), cos, sin).dtype == torch.bfloat16


# --- gated_activation --------------------------------------------------------------------------------------


def silu_formula(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh_formula(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [(silu, silu_formula), (gelu_tanh, gelu_tanh_formula)],
    ids=["silu", "gelu-tanh"],
)
@pytest.mark.parametrize("shape", [(1,), (3, 63), (2, 5, 33)], ids=str)
def test_gated_activation(activation: Any, formula: Any, shape: tuple[int, ...]) -> None:
    assert_same(
        lambda gate, up: gated_activation(gate, up, activation),
        lambda gate, up: formula(gate) * up,
        [torch.randn(shape) * 3, torch.randn(shape)],
    )


# --- all three ---------------------------------------------------------------------------------------------

ANGLES = torch.randn(2, 2, 5, 4)

PAIRS = {
    "rms_norm": (
        lambda x: rms_norm(x, torch.linspace(-1, 1, 6, dtype=x.dtype), EPS),
        lambda x: rms_norm_reference(x, torch.linspace(-1, 1, 6, dtype=x.dtype), EPS),
    ),
    "rotary": (
        lambda x: apply_rotary(x, *ANGLES.to(x.dtype)),
        lambda x: apply_rotary_reference(x, *ANGLES.to(x.dtype)),
    ),
    "gated_activation": (
        lambda x: gated_activation(x, x.flip(-1), silu),
        lambda x: gated_activation_reference(x, x.flip(-1), silu),
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_values_equal_the_reference_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    function, reference = PAIRS[name]
    contiguous = torch.randn(2, 3, 5, 6).to(dtype)
    for x in (contiguous, contiguous.transpose(1, 2).contiguous().transpose(1, 2), contiguous[:, :0]):
        assert torch.equal(function(x), reference(x))


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_add_up_where_an_input_is_used_twice(name: str) -> None:
    function, reference = PAIRS[name]
    wide = torch.randn(2, 7, 5, 6).transpose(1, 2)[:, :, :3].transpose(1, 2)
    assert_same(lambda x: function(x) + function(function(x)), lambda x: twice(reference, x), [wide])


def twice(function: Function, x: torch.Tensor) -> torch.Tensor:
    return function(x) + function(function(x))


@pytest.mark.parametrize("name", PAIRS)
def test_a_second_derivative_is_refused(name: str) -> None:
    """Backward is written by hand and has no derivative of its own: better no number than a wrong one."""
    x = torch.randn(2, 3, 5, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(PAIRS[name][0](x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_gradient_is_computed_for_a_frozen_weight() -> None:
    """It takes a sum over rows, besides the one in the mean over channels."""
    sums = {}
    for is_frozen in (False, True):
        x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=not is_frozen)
        output = rms_norm(x, weight, EPS)
        with torch.profiler.profile() as profile:
            output.backward(torch.ones(3, 5))
        sums[is_frozen] = sum(event.count for event in profile.key_averages() if event.key == "aten::sum")
        assert x.grad is not None
    assert sums == {False: 2, True: 1}
