"""The whole LoRA MLP gives what its formula gives, whatever is kept, in tiles of any size."""

import itertools

import pytest
import torch

from fettle.ops import lora_mlp as module
from fettle.ops.lora_linear import LowRank
from fettle.ops.lora_mlp import MLP, Projection, lora_mlp, lora_mlp_reference

HIDDEN, INTERMEDIATE, RANK = 12, 20, 3


def projection(outputs: int, inputs: int, *, is_adapted: bool, dtype: torch.dtype) -> Projection:
    weight = torch.randn(outputs, inputs).mul_(inputs**-0.5).to(dtype)
    if not is_adapted:
        return Projection(weight, None)
    a = torch.randn(RANK, inputs, requires_grad=True)
    b = torch.randn(outputs, RANK, requires_grad=True)
    return Projection(weight, LowRank(a, b, 0.7))


def make(*, is_fused: bool = True, adapted: str = "gud", name: str = "silu", dtype=torch.float32) -> MLP:
    torch.manual_seed(0)
    if is_fused:
        gate_up = (projection(2 * INTERMEDIATE, HIDDEN, is_adapted="g" in adapted, dtype=dtype),)
    else:
        gate_up = tuple(
            projection(INTERMEDIATE, HIDDEN, is_adapted=part in adapted, dtype=dtype) for part in "gu"
        )
    return MLP(gate_up, projection(HIDDEN, INTERMEDIATE, is_adapted="d" in adapted, dtype=dtype), name)


def as_double(mlp: MLP) -> MLP:
    def double(p: Projection) -> Projection:
        if p.update is None:
            return Projection(p.weight.double(), None)
        a, b = (t.detach().double().requires_grad_() for t in (p.update.a, p.update.b))
        return Projection(p.weight.double(), LowRank(a, b, p.update.scale))

    return MLP(tuple(map(double, mlp.gate_up)), double(mlp.down), mlp.activation_name)


def run(function, x: torch.Tensor, mlp: MLP, **options) -> list[torch.Tensor]:
    """The output and the gradients of x and of all adapters."""
    x = x.detach().requires_grad_()
    output = function(x, mlp, **options)
    torch.manual_seed(1)
    weights = torch.randn(output.shape).to(output.dtype)
    wanted = [x, *(t for t in mlp.adapters() if t is not None)]
    return [output, *torch.autograd.grad((output * weights).sum(), wanted)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TILE_TOKENS, "cpu", 4)


@pytest.mark.parametrize(
    ("is_fused", "adapted"), list(itertools.product([True, False], ["gud", "d", "gu", ""])), ids=str
)
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("keep", ["gates", "input"])
def test_values_and_gradients(is_fused: bool, adapted: str, name: str, keep) -> None:
    mlp = make(is_fused=is_fused, adapted=adapted, name=name)
    x = torch.randn(2, 5, HIDDEN)
    expected = run(lora_mlp_reference, x.double(), as_double(mlp))
    for found, exact in zip(run(lora_mlp, x, mlp, keep=keep), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_what_is_kept_changes_no_bit() -> None:
    mlp, x = make(), torch.randn(11, HIDDEN)
    for kept, redone in zip(run(lora_mlp, x, mlp), run(lora_mlp, x, mlp, keep="input"), strict=True):
        assert torch.equal(kept, redone)


@pytest.mark.parametrize("keep", ["gates", "input"])
def test_gradients_do_not_need_the_output(keep) -> None:
    mlp, x = make(), torch.randn(11, HIDDEN)
    _, *expected = run(lora_mlp, x, mlp)
    _, *found = run(lora_mlp, x, mlp, keep=keep, skip_output=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_input_without_gradient() -> None:
    mlp, x = make(), torch.randn(6, HIDDEN)
    adapters = [t for t in mlp.adapters() if t is not None]
    _, _, *expected = run(lora_mlp, x, mlp)
    torch.manual_seed(1)
    weights = torch.randn(x.shape)
    found = torch.autograd.grad((lora_mlp(x, mlp) * weights).sum(), adapters)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bf16_is_as_near_as_the_reference() -> None:
    mlp = make(dtype=torch.bfloat16)
    x = torch.randn(16, HIDDEN).bfloat16()
    exact = run(lora_mlp_reference, x.double(), as_double(mlp))
    plain = run(lora_mlp_reference, x, mlp)
    for found, stock, truth in zip(run(lora_mlp, x, mlp), plain, exact, strict=True):
        error, allowed = (found.double() - truth).norm(), (stock.double() - truth).norm()
        assert error <= 1.5 * allowed + 1e-3 * truth.norm()


def test_only_what_was_asked_for_is_saved() -> None:
    def saved_elements(keep) -> int:
        mlp, saved = make(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            lora_mlp(torch.randn(7, HIDDEN, requires_grad=True), mlp, keep=keep)
        held = {t.data_ptr() for t in mlp.adapters() if t is not None}
        return sum(t.numel() for t in saved if t.data_ptr() not in held)

    assert saved_elements("input") == 7 * HIDDEN
    assert saved_elements("gates") == 7 * (HIDDEN + 2 * INTERMEDIATE)


@pytest.mark.parametrize("keep", ["gates", "input"])
def test_adapters_that_change_before_backward_are_noticed(keep) -> None:
    mlp = make()
    loss = lora_mlp(torch.randn(5, HIDDEN, requires_grad=True), mlp, keep=keep).sum()
    with torch.no_grad():
        mlp.down.update.b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
