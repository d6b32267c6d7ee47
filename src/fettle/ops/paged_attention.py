"""Attention over a cache of keys and values in pages (Kwon et al., 2023, arXiv 2309.06180), for inference.

    out = softmax(scale * q k^T) v over the cached keys j of the query's own sequence with i - window < j <= i

With `softcap` the scores s become softcap * tanh(s / softcap) first. A query's position i counts from the sequence's
first token; a sequence of n cached tokens has its newest at i = n - 1.

One layer's cache is two tensors, keys and values, (pages, page_size, K, D). A sequence's tokens lie in the pages that
its row of `page_table`, (S, max_pages) int32, lists in order. Entries beyond its length may be any valid page: neither
they nor unused slots of its last page are read. A slot is page * page_size + offset.

On a GPU nothing here waits for the device, and grids depend on shapes alone, so that a CUDA graph can capture it;
call each function once before the capture, as the first call compiles.

Shapes: S sequences, T new tokens of all sequences, H heads, K key-value heads (H a multiple of K), D channels per head.
"""

import torch
import torch.nn.functional as F

from fettle.ops.attention import softcap_attention
from fettle.ops.dispatch import best_product_dtype, uses_triton
from fettle.ops.rotary import apply_rotary

# --- write -------------------------------------------------------------------------------------------------


def write_cache(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Copy the new tokens' key and value, (T, K, D), to their slots in the cache.

    slots: (T,) int32 or int64; tokens with a negative slot (padding) are skipped.
    """
    if uses_triton(keys):
        from fettle.ops.kernels import cache as kernels

        kernels.write_cache(key, value, keys, values, slots)
        return
    real = (slots >= 0).nonzero().flatten()
    for new, cache in ((key, keys), (value, values)):
        rows = new.index_select(0, real).to(cache.dtype)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots.index_select(0, real).long(), rows)


def rotate_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Return the rotated query, (T, H, D), and write the rotated key and the value to their slots in the cache.

    query: (T, H, D); key, value: (T, K, D); views of one fused projection need no copy. cos, sin: (T, rotary_dim),
    see `ops.rotary`. slots: as in `write_cache`.
    """
    if uses_triton(keys):
        from fettle.ops.kernels import cache as kernels

        return kernels.rotate_and_cache(query, key, value, cos, sin, keys, values, slots)
    turned, key = (apply_rotary(x.transpose(0, 1)[None], cos[None], sin[None])[0] for x in (query, key))
    write_cache(key.transpose(0, 1), value, keys, values, slots)
    return turned.transpose(0, 1).to(query.dtype)


# --- read --------------------------------------------------------------------------------------------------


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Return the attention of one query per sequence, the newest token, to all cached tokens: (S, H, D).

    query: (S, H, D). lengths: (S,) int32, cached tokens including the new one; 0 marks a padding row, whose result is
    zero. splits: parts of each sequence that a GPU works on at the same time; None chooses it by the shapes.
    """
    if uses_triton(query):
        from fettle.ops.kernels import paged_attention as kernels

        return kernels.decode_attention(
            *(query, keys, values, page_table, lengths),
            scale=scale,
            window=window,
            softcap=softcap,
            splits=splits,
        )
    return decode_attention_reference(
        query, keys, values, page_table, lengths, scale=scale, window=window, softcap=softcap
    )


def rotate_and_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Return `decode_attention` of the rotated query, and write the rotated key and the value to the cache: (S, H, D).

    All of a decode step between the projections, in one launch on a GPU (two if sequences are split). query: (S, H, D);
    key, value: (S, K, D), of each sequence's newest token, at position lengths - 1; cos, sin: (S, rotary_dim).
    """
    if uses_triton(query):
        from fettle.ops.kernels import paged_attention as kernels

        return kernels.decode_attention(
            *(query, keys, values, page_table, lengths),
            scale=scale,
            window=window,
            softcap=softcap,
            splits=splits,
            new=(key, value, cos, sin),
        )
    last, page_size = (lengths.long() - 1).clamp(min=0), keys.shape[1]
    slots = page_table.gather(1, last[:, None] // page_size)[:, 0] * page_size + last % page_size
    slots = torch.where(lengths > 0, slots, -1)
    query = rotate_and_cache(query, key, value, cos, sin, keys, values, slots)
    return decode_attention_reference(
        query, keys, values, page_table, lengths, scale=scale, window=window, softcap=softcap
    )


def decode_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute the formula in plain PyTorch over the gathered cache: the specification of `decode_attention`."""
    if not len(query):
        return torch.empty_like(query)
    count = _visible_keys(int(lengths.max()), window)
    # (S, count): every sequence's last `count` positions; those before its start are masked
    positions = lengths[:, None] - count + torch.arange(count, device=query.device)
    shared, dtype = keys.shape[2], best_product_dtype(query.device.type, query.dtype)
    k, v = (_gather(x, page_table, positions.clamp(min=0)).to(dtype) for x in (keys, values))
    # (S, K, H / K, D): the query heads of one key head as its queries
    q = query.unflatten(1, (shared, -1)).to(dtype)
    out = _attend(q, k, v, (positions >= 0)[:, None, None], scale, softcap).to(query.dtype)
    return out.flatten(1, 2).masked_fill_((lengths == 0)[:, None, None], 0)


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    bounds: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the attention of several new tokens per sequence, already cached, to all tokens up to them: (T, H, D).

    query: (T, H, D), the sequences' new tokens one after the other. bounds: (S + 1,) int32, where each sequence's new
    tokens begin in `query`, and where the last one's end; rows from there on (padding) become zero. lengths: (S,)
    int32, cached tokens of each sequence including its new ones. The i-th of n new tokens is at position
    lengths - n + i.
    """
    if uses_triton(query):
        from fettle.ops.kernels import paged_attention as kernels

        return kernels.prefill_attention(
            *(query, keys, values, page_table, bounds, lengths),
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return prefill_attention_reference(
        query, keys, values, page_table, bounds, lengths, scale=scale, window=window, softcap=softcap
    )


def prefill_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    page_table: torch.Tensor,
    bounds: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute the formula in plain PyTorch, sequence by sequence: the specification of `prefill_attention`."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    shared, dtype = keys.shape[2], best_product_dtype(query.device.type, query.dtype)
    begins = bounds.tolist()
    for sequence, (begin, end, length) in enumerate(
        zip(begins[:-1], begins[1:], lengths.tolist(), strict=True)
    ):
        if begin == end:
            continue
        first = length - _visible_keys(length, None if window is None else window + end - begin - 1)
        j = torch.arange(first, length, device=query.device)
        i = torch.arange(length - (end - begin), length, device=query.device)[:, None]
        seen = j <= i if window is None else (j <= i) & (j > i - window)
        # (K, 1, keys, D)
        k, v = (
            _gather(x, page_table[sequence, None], j[None])[0].unsqueeze(1).to(dtype) for x in (keys, values)
        )
        # (K, H / K, queries, D)
        q = query[begin:end].unflatten(1, (shared, -1)).permute(1, 2, 0, 3).to(dtype)
        found = _attend(
            q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1), seen, scale, softcap
        )
        out[begin:end] = found.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _visible_keys(longest: int, window: int | None) -> int:
    return max(1, longest if window is None else min(longest, window))


def _gather(cache: torch.Tensor, page_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the cached tokens at `positions` (S, N) of each sequence: (S, K, N, D)."""
    page_size = cache.shape[1]
    slots = page_table.gather(1, positions.long() // page_size) * page_size + positions % page_size
    rows = cache.view(-1, *cache.shape[2:]).index_select(0, slots.flatten())
    return rows.unflatten(0, slots.shape).transpose(1, 2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """query: (batch, heads, queries, D); key, value: (batch, heads, keys, D); seen: bool, broadcast to the scores."""
    if softcap is not None:
        return softcap_attention(query, key, value, seen, scale=scale, softcap=softcap)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
