"""lora_linear against its reference and plain numbers: values, gradients, memory kept, work done."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fettle.ops.lora_linear import (
    LowRank,
    Projection,
    lora_linear,
    lora_linear_reference,
    lora_linears,
)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]

# inputs, outputs, rank: all odd, rank one, rank beyond the inputs
SIZES = [(7, 5, 3), (33, 63, 1), (1, 1, 1), (3, 9, 5)]
SHAPES = [(1,), (7,), (2, 5), (2, 3, 4)]


def make(
    shape: tuple[int, ...] = (2, 5),
    size: tuple[int, int, int] = (7, 5, 3),
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
) -> Inputs:
    """Inputs where x and the adapters want gradients; weight and bias are frozen."""
    inputs, outputs, rank = size
    x = torch.randn(*shape, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5
    lora_a = (torch.randn(rank, inputs, dtype=dtype) / inputs**0.5).requires_grad_()
    lora_b = torch.randn(outputs, rank, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(outputs, dtype=dtype) if bias else None, lora_a, lora_b


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_in_float64(
    shape: tuple[int, ...], size: tuple[int, int, int], bias: bool
) -> None:
    inputs = make(shape, size, bias=bias)
    x, weight, b, lora_a, lora_b = inputs
    by_hand = x @ (weight + 0.7 * lora_b @ lora_a).T + (0 if b is None else b)
    found, reference = lora_linear(*inputs, 0.7), lora_linear_reference(*inputs, 0.7)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(reference, by_hand)
    grad = torch.randn_like(found)
    wanted = (x, lora_a, lora_b)
    expected = torch.autograd.grad(reference, wanted, grad)
    for mine, theirs in zip(torch.autograd.grad(found, wanted, grad), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_by_finite_differences(size: tuple[int, int, int]) -> None:
    x, weight, bias, lora_a, lora_b = make((2, 3), size)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.5), (x, lora_a, lora_b)
    )


def test_the_output_is_new_memory() -> None:
    """It adds in place, and must not do so to anything the caller holds."""
    x, weight, bias, lora_a, lora_b = make()
    kept = [t.detach().clone() for t in (x, weight, bias, lora_a, lora_b) if t is not None]
    lora_linear(x, weight, bias, lora_a, lora_b, 2.0).sum().backward()
    for before, after in zip(kept, (x, weight, bias, lora_a, lora_b), strict=True):
        assert torch.equal(before, after)


def test_inputs_that_are_not_contiguous() -> None:
    _, weight, bias, lora_a, lora_b = make()
    x = torch.randn(7, 4, 3, dtype=torch.float64).transpose(0, 2).requires_grad_()
    found = lora_linear(x, weight, bias, lora_a, lora_b, 0.5)
    expected = lora_linear_reference(x, weight, bias, lora_a, lora_b, 0.5)
    torch.testing.assert_close(found, expected)
    grad = torch.randn(5, 4, 3, dtype=torch.float64).transpose(0, 2)
    mine, theirs = (torch.autograd.grad(y, (x, lora_a, lora_b), grad) for y in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_that_is_one_number_repeated() -> None:
    """`sum().backward()` hands in an expanded tensor, of stride zero."""
    inputs = make()
    found, expected = lora_linear(*inputs, 0.5), lora_linear_reference(*inputs, 0.5)
    wanted = (inputs[0], inputs[3], inputs[4])
    mine, theirs = (torch.autograd.grad(y.sum(), wanted) for y in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


# --- types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_over_narrow_weights(dtype: torch.dtype) -> None:
    """Results come in x's type, the adapters' gradients in theirs; the error is of the type's rounding."""
    exact = make((3, 21), (33, 63, 5))
    narrow = [None if t is None else t.detach().to(dtype) for t in exact[:3]]
    x, weight, bias = narrow
    assert x is not None and weight is not None
    x.requires_grad_()
    lora_a, lora_b = (t.detach().float().requires_grad_() for t in exact[3:])
    found = lora_linear(x, weight, bias, lora_a, lora_b, 0.5)
    assert found.dtype == dtype
    grad = torch.randn(found.shape).to(dtype)
    mine = torch.autograd.grad(found, (x, lora_a, lora_b), grad)
    assert [g.dtype for g in mine] == [dtype, torch.float32, torch.float32]

    wide = [
        None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, lora_a, lora_b)
    ]
    expected = lora_linear_reference(*wide, 0.5)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(expected, (wide[0], wide[3], wide[4]), grad.double())  # type: ignore[arg-type]
    for a, b in zip((found, *mine), (expected, *theirs), strict=True):
        assert (a.double() - b).norm() / b.norm() < 4 * torch.finfo(dtype).eps


# --- memory ------------------------------------------------------------------------------------------------


def saved_by(function: Any, *args: Any) -> list[torch.Tensor]:
    """The tensors autograd keeps between forward and backward."""
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return saved


def assert_kept(saved: list[torch.Tensor], x: torch.Tensor, *adapters: torch.Tensor) -> None:
    """x, the adapters as they are, and x A^T: nothing else."""
    middle = (x.shape[0] * x.shape[1], adapters[0].shape[0])
    others = [t for t in saved if t.shape != middle]
    assert len(saved) - len(others) == 1
    assert {t.data_ptr() for t in others} == {t.data_ptr() for t in (x, *adapters)}


def test_only_its_inputs_are_kept() -> None:
    inputs = make(dtype=torch.float32)
    x, _, _, lora_a, lora_b = inputs
    saved = saved_by(lora_linear, *inputs, 1.0)
    assert_kept(saved, x, lora_a, lora_b)


def test_fp32_adapters_are_kept_as_they_are() -> None:
    """No copy of them in the weights' type, and none of x in theirs, waits for backward."""
    x, weight, bias, lora_a, lora_b = make(dtype=torch.float32)
    x, weight = x.detach().bfloat16().requires_grad_(), weight.bfloat16()
    bias = None if bias is None else bias.bfloat16()
    saved = saved_by(lora_linear, x, weight, bias, lora_a, lora_b, 1.0)
    assert_kept(saved, x, lora_a, lora_b)


def test_a_frozen_weight_gets_no_gradient() -> None:
    """Not even where someone asks for one: this function is for frozen weights."""
    x, weight, bias, lora_a, lora_b = make()
    weight.requires_grad_()
    lora_linear(x, weight, bias, lora_a, lora_b, 1.0).sum().backward()
    assert weight.grad is None
    assert x.grad is not None and lora_a.grad is not None and lora_b.grad is not None


@pytest.mark.parametrize("x_is_frozen", [False, True])
def test_the_work_of_a_backward_pass(x_is_frozen: bool) -> None:
    """No product for the weight's gradient, and none for x's where nobody asks (a first layer)."""
    (tokens, inputs, outputs, rank) = (10, 33, 63, 3)
    x, weight, bias, lora_a, lora_b = make((tokens,), (inputs, outputs, rank))
    out = lora_linear(x.requires_grad_(not x_is_frozen), weight, bias, lora_a, lora_b, 1.0)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    down, up = 2 * tokens * inputs * rank, 2 * tokens * rank * outputs
    adapters = up + down + up  # through B, to A and to B
    to_x = 0 if x_is_frozen else 2 * tokens * outputs * inputs + down
    assert adapters <= counter.get_total_flops() <= adapters + to_x  # it may not count products done in place
    assert (x.grad is None) == x_is_frozen
    assert lora_a.grad is not None and lora_b.grad is not None


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_a_frozen_adapter_matrix_gets_no_gradient(frozen: str) -> None:
    x, weight, bias, lora_a, lora_b = make()
    tensors = {"x": x, "lora_a": lora_a, "lora_b": lora_b}
    tensors[frozen].requires_grad_(False)
    lora_linear(x, weight, bias, lora_a, lora_b, 1.0).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is None} == {frozen}


@pytest.mark.parametrize("x_is_frozen", [False, True])
def test_layers_of_one_input_are_as_each_alone(x_is_frozen: bool) -> None:
    """Of several sizes and ranks, with and without bias; one has no update."""
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=not x_is_frozen)
    layers = []
    for outputs, rank in ((4, 3), (6, 2), (3, 0)):
        _, weight, bias, a, b = make(size=(7, outputs, max(1, rank)), bias=outputs != 6)
        layers.append(Projection(weight, LowRank(a, b, 0.7) if rank else None, bias))
    adapters = [t for p in layers if p.update for t in (p.update.a, p.update.b)]
    wanted = adapters if x_is_frozen else [x, *adapters]
    alone = [
        lora_linear_reference(x, p.weight, p.bias, p.update.a, p.update.b, 0.7)
        if p.update
        else torch.nn.functional.linear(x, p.weight, p.bias)
        for p in layers
    ]
    together = lora_linears(x, layers)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(sum(y.pow(2).sum() for y in alone), wanted)
    found = torch.autograd.grad(sum(y.pow(2).sum() for y in together), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_adapters_that_change_before_backward_are_noticed() -> None:
    a, b = torch.randn(2, 6, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    loss = lora_linear(torch.randn(5, 6, requires_grad=True), torch.randn(4, 6), None, a, b, 1.0).sum()
    with torch.no_grad():
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
