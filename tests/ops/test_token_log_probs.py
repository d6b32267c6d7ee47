"""Log-probabilities of labels agree with the formula in double precision, without all logits at once."""

import pytest
import torch

from fettle.ops import token_log_probs as module
from fettle.ops.token_log_probs import token_log_probs, token_log_probs_reference

HIDDEN, VOCABULARY = 16, 37


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 4)
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)


def inputs(tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(tokens, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.randint(VOCABULARY, (tokens,))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen head", "trained head"])
def test_scores_and_gradients(softcap: float | None, is_trained: bool, temperature: float) -> None:
    hidden, weight, labels = inputs()
    factors = torch.randn(len(labels))
    results = []
    for function, dtype in ((token_log_probs, torch.float32), (token_log_probs_reference, torch.float64)):
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype).requires_grad_(is_trained)
        scores = function(h, w, labels, softcap, temperature)
        grads = torch.autograd.grad((scores.log_probs * factors).sum(), [h, w] if is_trained else [h])
        others = (scores.entropy, scores.mean_logits, scores.log_sum_sq_probs)
        results.append([scores.log_probs, *others, *grads, scores.is_top1])
    *found, found_top1 = results[0]
    *expected, expected_top1 = results[1]
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found_top1, expected_top1)


def test_entropy_has_no_gradient() -> None:
    """Better an error than a loss term that trains nothing."""
    hidden, weight, labels = inputs()
    assert not token_log_probs(hidden.requires_grad_(), weight, labels).entropy.requires_grad


def test_certain_tokens_have_no_entropy() -> None:
    weight = torch.eye(VOCABULARY, HIDDEN) * 1e4
    hidden = torch.eye(4, HIDDEN)
    scores = token_log_probs(hidden, weight, torch.arange(4))
    assert torch.equal(scores.log_probs, torch.zeros(4)) and torch.equal(scores.entropy.abs(), torch.zeros(4))
    assert scores.is_top1.all()


def test_no_tokens() -> None:
    hidden, weight, labels = inputs(0)
    hidden.requires_grad_()
    token_log_probs(hidden, weight, labels).log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)


def test_bf16_is_as_near_as_the_reference() -> None:
    hidden, weight, labels = inputs(64)
    gradients = []
    for function, dtype in (
        (token_log_probs, torch.bfloat16),
        (token_log_probs_reference, torch.bfloat16),
        (token_log_probs_reference, torch.float64),
    ):
        h = hidden.bfloat16().to(dtype).requires_grad_()
        scores = function(h, weight.bfloat16().to(dtype), labels)
        scores.log_probs.mean().backward()
        assert h.grad is not None
        gradients.append(h.grad.double())
    ours, stock, exact = gradients
    assert (ours - exact).norm() <= 1.5 * (stock - exact).norm()


def test_logits_never_exist_for_all_tokens() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    hidden, weight, labels = inputs(101)
    with Watch():
        token_log_probs(hidden.requires_grad_(), weight, labels).log_probs.sum().backward()
    assert largest <= max(4 * VOCABULARY, 101 * HIDDEN)


def test_hidden_states_of_another_type_than_the_heads_are_refused() -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(AssertionError, match=r"hidden is torch\.float32 and the head torch\.bfloat16"):
        token_log_probs(hidden, weight.bfloat16(), labels)
