"""The Triton kernels of the paged cache against their references in float64."""

import pytest
import torch

from fettle.ops.dispatch import uses_triton
from fettle.ops.paged_attention import (
    decode_attention,
    decode_attention_reference,
    prefill_attention,
    prefill_attention_reference,
    rotate_and_cache,
    rotate_and_decode,
    write_cache,
)
from fettle.ops.rotary import apply_rotary_reference

PAGE = 4
RULES = [{}, {"window": 1}, {"window": 6}, {"softcap": 0.8}, {"softcap": 0.8, "window": 40}]
# heads, key-value heads, channels: by rows with one and two query heads, and by the matrix units
HEADS = [(2, 2, 16), (4, 2, 24), (6, 2, 16), (7, 1, 33)]


def filled_cache(
    lengths: list[int], heads: int, channels: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return keys, values, page table and lengths; all slots that no sequence uses hold NaN."""
    needed = [-(-n // PAGE) for n in lengths]
    pages = torch.randperm(sum(needed) + 2)
    cache = torch.full((2, len(pages), PAGE, heads, channels), torch.nan)
    table = pages[-1].repeat(len(lengths), max(needed) + 1).int()
    for sequence, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        own, pages = pages[:count], pages[count:]
        table[sequence, :count] = own
        slots = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]
        cache.flatten(1, 2)[:, slots] = torch.randn(2, length, heads, channels)
    keys, values = cache.to(device)
    return keys, values, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


@pytest.mark.parametrize(("splits", "rules"), [(1, {}), *((3, rules) for rules in RULES)], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode(kernel_device: str, heads: tuple[int, int, int], splits: int, rules: dict) -> None:
    query_heads, shared, channels = heads
    keys, values, table, lengths = filled_cache([1, 0, 7, 100], shared, channels, kernel_device)
    fused = torch.randn(4, query_heads + 1, channels, device=kernel_device)
    query = fused[:, 1:]
    assert uses_triton(query)
    found = decode_attention(query, keys, values, table, lengths, scale=0.3, splits=splits, **rules)
    wide = [x.double() for x in (query, keys, values)]
    expected = decode_attention_reference(*wide, table, lengths, scale=0.3, **rules)
    assert not expected[1].any()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", [{}, {"softcap": 0.8, "window": 40}, {"window": 1}], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotate_and_decode(kernel_device: str, heads: tuple[int, int, int], rules: dict) -> None:
    """The slot of the newest token is written, and not read before."""
    query_heads, shared, channels = heads
    keys, values, table, lengths = filled_cache([1, 0, 8, 100], shared, channels, kernel_device)
    fused = torch.randn(4, query_heads + 2 * shared, channels, device=kernel_device)
    query, key, value = fused.split([query_heads, shared, shared], 1)
    cos, sin = torch.randn(2, 4, channels // 4 * 2, device=kernel_device)
    place = (lengths - 1).clamp(min=0).long()
    slots = table.gather(1, place[:, None] // PAGE)[:, 0] * PAGE + place % PAGE
    slots[1] = -1
    expected_keys, expected_values = keys.clone(), values.clone()
    for cache in (keys, values):
        cache.flatten(0, 1)[slots[slots >= 0]] = torch.nan
    turned = rotate_and_cache(query, key, value, cos, sin, expected_keys, expected_values, slots)
    wide = [x.double() for x in (turned, expected_keys, expected_values)]
    expected = decode_attention_reference(*wide, table, lengths, scale=0.3, **rules)
    for splits in (1, 3):
        found_keys, found_values = keys.clone(), values.clone()
        found = rotate_and_decode(
            *(query, key, value, cos, sin, found_keys, found_values, table, lengths),
            **{"scale": 0.3, "splits": splits, **rules},
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found_keys, expected_keys, equal_nan=True)
        torch.testing.assert_close(found_values, expected_values, equal_nan=True)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill(kernel_device: str, heads: tuple[int, int, int], rules: dict) -> None:
    query_heads, shared, channels = heads
    new = [1, 0, 35, 5]
    keys, values, table, lengths = filled_cache([30, 0, 35, 70], shared, channels, kernel_device)
    query = torch.randn(sum(new) + 3, query_heads, channels, device=kernel_device)  # three rows of padding
    bounds = torch.tensor([0, *new], device=kernel_device).cumsum(0).int()
    found = prefill_attention(query, keys, values, table, bounds, lengths, scale=0.3, **rules)
    wide = [x.double() for x in (query, keys, values)]
    expected = prefill_attention_reference(*wide, table, bounds, lengths, scale=0.3, **rules)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "shared", "channels"), [(3, 3, 10), (9, 3, 7)])
@pytest.mark.parametrize("rest", [0, 1, 4])
def test_rotate_and_cache(kernel_device: str, heads: int, shared: int, channels: int, rest: int) -> None:
    fused = torch.randn(5, heads + 2 * shared, channels, device=kernel_device)
    query, key, value = fused.split([heads, shared, shared], 1)
    cos, sin = torch.randn(2, 5, (channels - rest) // 2 * 2, device=kernel_device)
    keys, values = torch.zeros(2, 2, PAGE, shared, channels, device=kernel_device)
    slots = torch.tensor([5, -1, 2, 7, 0], device=kernel_device)
    found = rotate_and_cache(query, key, value, cos, sin, keys, values, slots)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_reference(x.transpose(0, 1)[None], cos[None], sin[None])[0].transpose(0, 1)

    real, used = [0, 2, 3, 4], [5, 2, 7, 0]
    torch.testing.assert_close(found, rotated(query))
    torch.testing.assert_close(keys.flatten(0, 1)[used], rotated(key)[real])
    assert torch.equal(values.flatten(0, 1)[used], value[real])
    for cache in (keys, values):
        cache.flatten(0, 1)[used] = 0
        assert not cache.any()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_write_cache(kernel_device: str, index: torch.dtype) -> None:
    key, value = torch.randn(2, 4, 9, 3, device=kernel_device)
    keys, values = torch.zeros(2, 3, PAGE, 9, 3, device=kernel_device)
    slots = torch.tensor([7, -1, 0, 9], dtype=index, device=kernel_device)
    write_cache(key, value, keys, values, slots)
    for new, cache in ((key, keys), (value, values)):
        rows = cache.flatten(0, 1)
        assert torch.equal(rows[[7, 0, 9]], new[[0, 2, 3]])
        rows[[7, 0, 9]] = 0
        assert not rows.any()
