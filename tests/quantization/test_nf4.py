"""Nf4Linear against a plain linear layer with the same, unpacked, matrix."""

import pytest
import torch
from torch import nn

from fettle.errors import UserError
from fettle.quantization.nf4 import STATE_KEY, Nf4Linear, dense_weight, from_tensors, to_tensors


@pytest.fixture
def layer() -> Nf4Linear:
    torch.manual_seed(0)
    return Nf4Linear.from_linear(nn.Linear(128, 96))


def test_output_and_gradient_are_those_of_the_unpacked_matrix(layer: Nf4Linear) -> None:
    plain = nn.Linear(128, 96)
    plain.weight.data, plain.bias.data = dense_weight(layer), layer.bias.data
    x = torch.randn(2, 5, 128, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    plain(other).square().sum().backward()
    assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(x.grad, other.grad)


def test_a_state_dict_goes_round(layer: Nf4Linear) -> None:
    state = layer.state_dict()
    other = Nf4Linear.from_linear(nn.Linear(128, 96))
    other.load_state_dict(state)
    assert set(state) >= {"weight", "weight.absmax", "weight.nested_absmax", STATE_KEY, "bias"}
    assert torch.equal(dense_weight(other), dense_weight(layer))
    assert torch.equal(other.bias, layer.bias)


def test_another_type_leaves_the_matrix_as_it_is(layer: Nf4Linear) -> None:
    before = dense_weight(layer)
    assert torch.equal(dense_weight(layer.to(torch.bfloat16)), before)


def test_other_kinds_are_refused(layer: Nf4Linear) -> None:
    tensors = to_tensors(layer.nf4)
    facts = bytes(tensors[STATE_KEY].tolist()).replace(b'"nf4"', b'"fp4"')
    tensors[STATE_KEY] = torch.tensor(list(facts), dtype=torch.uint8)
    with pytest.raises(UserError, match="fp4"):
        from_tensors(tensors, "model.safetensors")
