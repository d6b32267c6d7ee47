"""Attention over packed documents against one dense block-diagonal mask over the whole pack, in float64."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from fettle.ops import attention
from fettle.ops.attention import (
    QUERIES_AT_ONCE,
    Documents,
    KeptAttention,
    packed_attention,
    packed_attention_reference,
    softcap_attention,
)

PACKS = [
    [1],
    [63],
    [1, 1, 1],
    [2, 7, 33, 1, 63],
    [16, 17, 15, 32, 31, 33],
    [5] * 9,
    [64, 1, 128, 3],
]

# heads, key-value heads, channels
HEADS = [(4, 2, 6), (3, 3, 5), (6, 1, 7), (1, 1, 1)]


def starts_of(lengths: list[int]) -> torch.Tensor:
    is_start = torch.zeros(sum(lengths), dtype=torch.bool)
    is_start[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    return is_start


def make(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    query_heads, key_heads, channels = heads
    return [torch.randn(tokens, n, channels, dtype=dtype) for n in (query_heads, key_heads, key_heads)]


def visible(lengths: list[int], window: int | None) -> torch.Tensor:
    """(tokens, tokens), True where query i may see key j: one document, not later, within the window."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(len(document))[:, None], torch.arange(len(document))[None]
    seen = (document[:, None] == document[None]) & (j <= i)
    return seen if window is None else seen & (i - j < window)


def dense_formula(
    qkv: list[torch.Tensor], mask: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    q, k, v = qkv
    groups = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        scores = scale * q[:, h] @ k[:, h // groups].T
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        heads.append(torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ v[:, h // groups])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("softcap", [None, 0.8], ids=["plain", "softcap"])
@pytest.mark.parametrize("window", [None, 1, 5, 40], ids=["no-window", "window-1", "window-5", "window-40"])
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_values_and_gradients(lengths: list[int], window: int | None, softcap: float | None) -> None:
    inputs = make(sum(lengths), HEADS[0])
    narrow = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    documents = Documents.from_starts(starts_of(lengths))
    found = packed_attention(*narrow, documents, scale=0.6, window=window, softcap=softcap)
    expected = dense_formula(wide, visible(lengths, window), 0.6, softcap)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    grad = torch.randn_like(expected)
    mine = torch.autograd.grad(found, narrow, grad.float())
    theirs = torch.autograd.grad(expected, wide, grad)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_grouped_heads(heads: tuple[int, int, int]) -> None:
    lengths = [2, 7, 33]
    inputs = make(42, heads)
    found = packed_attention(*inputs, Documents.from_starts(starts_of(lengths)), scale=0.6)
    expected = dense_formula([x.double() for x in inputs], visible(lengths, None), 0.6, None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.8], ids=["plain", "softcap"])
def test_a_broken_document_harms_no_other(softcap: float | None) -> None:
    """NaN spreads through every product with it, weighted by zero or not: the strictest test for a leak."""
    lengths = [7, 9, 12, 33]
    inputs = make(61, HEADS[0])
    documents = Documents.from_starts(starts_of(lengths))
    before = packed_attention(*inputs, documents, scale=0.6, softcap=softcap)
    for x in inputs:
        x[7:16] = torch.nan
    after = packed_attention(*inputs, documents, scale=0.6, softcap=softcap)
    assert after[7:16].isnan().all()
    assert torch.equal(after[:7], before[:7])
    assert torch.equal(after[16:], before[16:])


@pytest.mark.parametrize("rules", [{}, {"window": 300}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("lengths", [[700], [257, 100, 1]], ids=str)
def test_bf16_is_as_exact_as_stock_attention(lengths: list[int], rules: dict) -> None:
    """Stock: PyTorch's fused attention of one document of 512 tokens; its error hardly depends on the length."""
    errors = {}
    for name in ("stock", "ours"):
        is_ours = name == "ours"
        tokens = sum(lengths) if is_ours else 512
        inputs = [x.bfloat16().requires_grad_() for x in make(tokens, (4, 4, 32))]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        documents = Documents.from_starts(starts_of(lengths if is_ours else [tokens]))
        asked = rules if is_ours else {}
        if is_ours:
            out = packed_attention(*inputs, documents, scale=0.3, **asked)
        else:
            q, k, v = (x.transpose(0, 1)[None] for x in inputs)
            stock = torch.nn.functional.scaled_dot_product_attention
            out = stock(q, k, v, is_causal=True, scale=0.3)[0].transpose(0, 1)
        expected = packed_attention_reference(*exact, documents, scale=0.3, **asked)
        grad = torch.randn_like(out)
        found = (out, *torch.autograd.grad(out, inputs, grad))
        right = (expected, *torch.autograd.grad(expected, exact, grad.double()))
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
    assert all(ours < 1.3 * stock for ours, stock in zip(errors["ours"], errors["stock"], strict=True)), (
        errors
    )


@pytest.mark.parametrize("rules", [{}, {"window": 40}, {"softcap": 2.0}], ids=str)
def test_memory_grows_with_the_tokens_not_their_square(rules: dict) -> None:
    tokens = 4096
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    inputs = [x.requires_grad_() for x in make(tokens, (1, 1, 8))]
    documents = Documents.from_starts(starts_of([tokens]))
    with Sizes():
        packed_attention(*inputs, documents, scale=0.3, **rules).sum().backward()
    assert 0 < max(sizes) < tokens**2 // 4


def test_only_what_needs_a_gradient_gets_one() -> None:
    q, k, v = make(20, HEADS[0])
    v.requires_grad_()
    packed_attention(q, k, v, Documents.from_starts(starts_of([20])), scale=0.6).sum().backward()
    assert q.grad is None and k.grad is None and v.grad is not None


@pytest.mark.parametrize("softcap", [None, 0.8], ids=["plain", "softcap"])
def test_a_redone_layer_reuses_what_was_kept(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = attention._forward
    monkeypatch.setattr(attention, "_forward", lambda *given: calls.append(1) or forward(*given))
    documents = Documents.from_starts(starts_of([33, 7]))
    inputs = [x.requires_grad_() for x in make(40, HEADS[0])]
    grad = torch.randn(40, 4, 6)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: KeptAttention | None) -> torch.Tensor:
        out = packed_attention(q * 1.5, k, v, documents, scale=0.6, softcap=softcap, kept=kept)
        return torch.tanh(out)

    plain = layer(*inputs, None)
    expected = torch.autograd.grad(plain, inputs, grad)
    calls.clear()
    redone = torch.utils.checkpoint.checkpoint(layer, *inputs, KeptAttention(), use_reentrant=False)
    found = torch.autograd.grad(redone, inputs, grad)
    assert len(calls) == 1
    assert torch.equal(redone, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_reference_is_the_formula() -> None:
    inputs = [x.double() for x in make(42, HEADS[0])]
    documents = Documents.from_starts(starts_of([2, 7, 33]))
    found = packed_attention_reference(*inputs, documents, scale=0.6, window=5, softcap=0.8)
    torch.testing.assert_close(found, dense_formula(inputs, visible([2, 7, 33], 5), 0.6, 0.8))


def test_documents_know_their_tokens_lengths() -> None:
    documents = Documents.from_starts(starts_of([3, 1, 20]))
    assert documents.lengths.tolist() == [3] * 3 + [1] + [20] * 20


def test_dropout_drops_and_keeps_the_mean() -> None:
    q, k, v = make(40, (2, 2, 4))
    v = torch.ones_like(v)
    documents = Documents.from_starts(starts_of([20, 20]))
    for softcap in (None, 5.0):
        runs = torch.stack(
            [
                packed_attention(q, k, v, documents, scale=0.6, softcap=softcap, dropout=0.5)
                for _ in range(200)
            ]
        )
        assert runs.std() > 0.1
        assert abs(runs.mean() - 1) < 0.05


def test_groups_bound_the_padding() -> None:
    """Documents beyond the smallest size are padded to less than twice their length."""
    documents = Documents.from_starts(starts_of([33, 64, 65, 128, 17, 1, 300]))
    assert sum(len(group.index) for group in documents.groups) == 7
    for group in documents.groups:
        lengths = group.is_real.sum(1)
        assert (group.index.shape[1] < 2 * lengths)[lengths > 16].all()


# --- softcap_attention, with a cache's and a caller's masks ------------------------------------------------


def test_boolean_and_additive_masks_say_the_same() -> None:
    q, k, v = (torch.randn(2, 3, n, 5) for n in (4, 9, 9))
    seen = torch.rand(2, 1, 4, 9) > 0.4
    seen[..., 0] = True
    additive = torch.zeros(2, 1, 4, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    by_bool, by_sum = (softcap_attention(q, k, v, mask, scale=0.6, softcap=2.0) for mask in (seen, additive))
    torch.testing.assert_close(by_bool, by_sum, rtol=0, atol=1e-6)
    scores = 2 * torch.tanh(0.6 * q.double() @ k.double().mT / 2)
    expected = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ v.double()
    torch.testing.assert_close(by_bool.double(), expected, rtol=0, atol=1e-6)


def test_bf16_keeps_its_type_and_softmax_its_precision() -> None:
    q, k, v = (torch.randn(1, 2, 33, 8).bfloat16() for _ in range(3))
    found = softcap_attention(q, k, v, None, scale=0.4, softcap=5.0)
    expected = softcap_attention(q.double(), k.double(), v.double(), None, scale=0.4, softcap=5.0)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() / expected.norm() < 0.01


class LargestResult(TorchDispatchMode):
    """Notes the most elements of a tensor made in its block."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, tuple | list) else (found,)
        self.elements = max([self.elements, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return found


def test_scores_of_a_long_prompt_never_exist_all_at_once() -> None:
    q, k, v = (torch.randn(2, 3, 600, 8) for _ in range(3))
    mask = torch.ones(600, 600, dtype=torch.bool).tril()
    with LargestResult() as largest:
        found = softcap_attention(q, k, v, mask, scale=0.4, softcap=5.0)
    assert largest.elements <= 2 * 3 * QUERIES_AT_ONCE * 600
    scores = 5 * torch.tanh(0.4 * q.double() @ k.double().mT / 5)
    expected = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ v.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
