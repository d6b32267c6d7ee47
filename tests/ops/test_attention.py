"""Attention over packed documents against one dense block-diagonal mask over the whole pack, in float64."""

import pytest
import torch

from fettle.ops.attention import Documents, packed_attention, softcap_attention

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
