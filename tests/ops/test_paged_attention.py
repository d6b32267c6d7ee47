"""The paged cache against dense attention over each sequence's own tokens in float64; unused memory holds NaN."""

import pytest
import torch

from fettle.ops.paged_attention import (
    decode_attention,
    prefill_attention,
    rotate_and_cache,
    rotate_and_decode,
    write_cache,
)
from fettle.ops.rotary import apply_rotary_reference

PAGE = 4
LENGTHS = [[1], [4, 0, 5], [9, 1, 23, 16], [0, 0, 2]]
RULES = [{}, {"window": 1}, {"window": 6}, {"window": 100}, {"softcap": 0.8}, {"softcap": 0.8, "window": 6}]
# heads, key-value heads, channels
HEADS = [(4, 2, 6), (3, 3, 5), (6, 1, 7), (1, 1, 1)]


def filled_cache(
    lengths: list[int], heads: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each sequence's keys and values, and the same in a cache with its page table, written through slots."""
    key = [torch.randn(n, heads, channels, dtype=dtype) for n in lengths]
    value = [torch.randn(n, heads, channels, dtype=dtype) for n in lengths]
    needed = [-(-n // PAGE) for n in lengths]
    pages = torch.randperm(sum(needed) + 2)
    keys, values = torch.full((2, len(pages), PAGE, heads, channels), torch.nan, dtype=dtype)
    table = pages[-1].repeat(len(lengths), max(needed) + 1).int()  # unused entries: a page full of NaN
    slots = []
    for sequence, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        own, pages = pages[:count], pages[count:]
        table[sequence, :count] = own
        slots.append((own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length])
    write_cache(torch.cat(key), torch.cat(value), keys, values, torch.cat(slots))
    return key, value, keys, values, table


def dense_formula(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The last tokens' attention to the whole sequence: query (n, H, D), key and value (N, K, D)."""
    query, key, value = (x.double() for x in (query, key, value))
    i = torch.arange(len(key) - len(query), len(key))[:, None]
    j = torch.arange(len(key))
    seen = j <= i if window is None else (j <= i) & (i - j < window)
    heads = []
    for head in range(query.shape[1]):
        shared = head * key.shape[1] // query.shape[1]
        scores = scale * query[:, head] @ key[:, shared].T
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        heads.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ value[:, shared])
    return torch.stack(heads, 1)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decode(lengths: list[int], rules: dict) -> None:
    query_heads, heads, channels = HEADS[0]
    key, value, keys, values, table = filled_cache(lengths, heads, channels)
    query = torch.randn(len(lengths), query_heads, channels)
    found = decode_attention(query, keys, values, table, torch.tensor(lengths).int(), scale=0.6, **rules)
    for sequence, length in enumerate(lengths):
        expected = torch.zeros(1, query_heads, channels, dtype=torch.float64)
        if length:
            expected = dense_formula(query[sequence, None], key[sequence], value[sequence], 0.6, **rules)
        torch.testing.assert_close(found[sequence].double(), expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "new"), [([5], [5]), ([9, 7, 23, 16], [1, 7, 10, 0]), ([0, 3], [0, 2])], ids=str
)
def test_prefill(lengths: list[int], new: list[int], rules: dict) -> None:
    query_heads, heads, channels = HEADS[0]
    key, value, keys, values, table = filled_cache(lengths, heads, channels)
    query = torch.randn(sum(new) + 2, query_heads, channels)  # two rows of padding
    bounds = torch.tensor([0, *new]).cumsum(0).int()
    found = prefill_attention(
        query, keys, values, table, bounds, torch.tensor(lengths).int(), scale=0.6, **rules
    )
    expected = [
        dense_formula(part, k, v, 0.6, **rules)
        for part, k, v in zip(query[: sum(new)].split(new), key, value, strict=True)
    ]
    expected.append(torch.zeros(2, query_heads, channels, dtype=torch.float64))
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_and_dtypes(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    query_heads, shared, channels = heads
    lengths, tolerance = [9, 3], {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    key, value, keys, values, table = filled_cache(lengths, shared, channels, dtype)
    query, counts = torch.randn(5, query_heads, channels, dtype=dtype), torch.tensor(lengths).int()
    found = decode_attention(query[:2], keys, values, table, counts, scale=0.6)
    expected = torch.cat([dense_formula(query[i, None], key[i], value[i], 0.6) for i in range(2)])
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    found = prefill_attention(query, keys, values, table, torch.tensor([0, 2, 5]).int(), counts, scale=0.6)
    parts = query.split([2, 3])
    expected = torch.cat([dense_formula(parts[i], key[i], value[i], 0.6) for i in range(2)])
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_decode_of_no_sequence() -> None:
    keys, values = torch.zeros(2, 3, PAGE, 2, 6)
    table, lengths = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    query = torch.empty(0, 4, 6)
    assert decode_attention(query, keys, values, table, lengths, scale=1.0).shape == query.shape


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_write_cache_skips_padding_and_leaves_other_slots(index: torch.dtype) -> None:
    key, value = torch.randn(2, 4, 2, 3)
    keys, values = torch.zeros(2, 3, PAGE, 2, 3)
    write_cache(key, value, keys, values, torch.tensor([7, -1, 0, 9], dtype=index))
    for new, cache in ((key, keys), (value, values)):
        rows = cache.view(-1, 2, 3)
        assert torch.equal(rows[[7, 0, 9]], new[[0, 2, 3]])
        rows[[7, 0, 9]] = 0
        assert not rows.any()


@pytest.mark.parametrize("rotary_dim", [6, 4], ids=["whole", "partial"])
def test_rotate_and_cache_takes_views_of_a_fused_projection(rotary_dim: int) -> None:
    fused = torch.randn(3, 4 + 2 * 2, 6)
    query, key, value = fused.split([4, 2, 2], 1)
    cos, sin = torch.randn(2, 3, rotary_dim)
    keys, values = torch.zeros(2, 2, PAGE, 2, 6)
    found = rotate_and_cache(query, key, value, cos, sin, keys, values, torch.tensor([5, -1, 2]))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_reference(x.transpose(0, 1)[None], cos[None], sin[None])[0].transpose(0, 1)

    torch.testing.assert_close(found, rotated(query))
    torch.testing.assert_close(keys.view(-1, 2, 6)[[5, 2]], rotated(key)[[0, 2]])
    assert torch.equal(values.view(-1, 2, 6)[[5, 2]], value[[0, 2]])
    assert int(keys.view(-1, 12).any(1).sum()) == 2


def test_rotate_and_decode_is_both_in_turn() -> None:
    lengths = [9, 0, 3]
    _, _, keys, values, table = filled_cache(lengths, 2, 6)
    query, key, value = torch.randn(3, 8, 6).split([4, 2, 2], 1)
    cos, sin = torch.randn(2, 3, 4)
    counts = torch.tensor(lengths).int()
    slots = torch.tensor([int(table[0, 2]) * PAGE, -1, int(table[2, 0]) * PAGE + 2])
    others = keys.clone(), values.clone()
    found = rotate_and_decode(query, key, value, cos, sin, keys, values, table, counts, scale=0.6)
    turned = rotate_and_cache(query, key, value, cos, sin, *others, slots)
    assert torch.equal(found, decode_attention(turned, *others, table, counts, scale=0.6))
    for mine, theirs in zip((keys, values), others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
