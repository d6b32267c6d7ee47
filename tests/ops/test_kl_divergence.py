"""KL divergence against torch's own on exact distributions, and on those that rounding leaves almost equal."""

import math

import pytest
import torch

from fettle.ops.kl_divergence import kl_divergence


def test_it_is_torchs_divergence() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 7, 50, dtype=torch.double).log_softmax(-1)
    expected = torch.nn.functional.kl_div(second, first, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_divergence(first, second), expected)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7, 1e-6])
def test_rounding_never_makes_it_negative(noise: float) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(200, 1000)
    first, second = logits.log_softmax(-1), (logits + noise * torch.randn_like(logits)).log_softmax(-1)
    found = kl_divergence(first, second)
    assert (found >= 0).all()
    assert found.mean() <= max(noise, 1e-7) ** 2 * 100


def test_what_is_not_finite_stays_so() -> None:
    uniform = torch.full((2,), math.log(0.5))
    assert kl_divergence(uniform, torch.tensor([0.0, -math.inf])) == math.inf
    assert kl_divergence(uniform, torch.tensor([math.nan, -0.7])).isnan()
    never = torch.tensor([0.0, -math.inf])  # neither gives the second token
    assert kl_divergence(never, never) == 0
