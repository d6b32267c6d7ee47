# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention over a paged cache in Triton, for decode and prefill. See `fettle.ops.paged_attention`.

Decode is bound by the bytes of keys and values. Flash-decoding (Dao et al., 2023): several programs share a sequence,
each with one part of its keys, and a second kernel merges their results by logsumexp. The number of parts is fixed by
the shapes, their length by the sequence, so that a captured launch serves every length. A program takes all query
heads of one key head, and reads each key and value once.

- One or two query heads: products on the ordinary units. Every row of a tile of keys keeps a softmax of its own, with
  its own maximum, sum and result; they are merged after the last tile, so the loop never waits for other threads.
- More: products on the matrix units, the heads padded to 16 rows.

Shapes: S sequences, T new tokens, H heads, K key-value heads, GROUP = H / K, D channels, PADDED the next power of two.
"""

import torch
import triton
import triton.language as tl

from fettle.ops.kernels.attention import block_size
from fettle.ops.kernels.cache import dense_channels, strides

LEAST_ROWS = 16  # of a product on the matrix units
# Finite, so that a row without visible keys gives exp2(-inf - LOWEST) = 0 instead of NaN.
LOWEST = tl.constexpr(-1.0e30)
# Scores are in units of log 2, as exp2 is faster than exp.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part(lengths, sequence, window, splits, KEYS: tl.constexpr):
    """Return where the visible keys of a sequence begin and end, and the keys per part, whole tiles."""
    end = tl.load(lengths + sequence)
    begin = tl.maximum(end - window, 0)
    return begin, end, tl.maximum(tl.cdiv(tl.cdiv(end - begin, splits), KEYS), 1) * KEYS


@triton.jit
def _slots(page_table, j, end, PAGE: tl.constexpr):
    """Return the slots of the positions j of one sequence; those from `end` on are not looked up."""
    return tl.load(page_table + j // PAGE, j < end, 0).to(tl.int64) * PAGE + j % PAGE


@triton.jit
def _capped(scores, scale, SOFTCAP: tl.constexpr):
    """Return scale * scores, with the cap if there is one, in units of log 2."""
    if SOFTCAP > 0:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
        return (1 - 2 / (tl.exp2(scores * (scale * (2 * LOG2_E / SOFTCAP))) + 1)) * (SOFTCAP * LOG2_E)
    return scores * (scale * LOG2_E)


@triton.jit
def _rotated(x, x_head, head, channel, mask, cos, sin, dtype: tl.constexpr, ROTARY: tl.constexpr):
    """Return the channels of `x + head * x_head`, rotated as `ops.rotary` does and rounded to `dtype`, in fp32."""
    is_first, is_turned = channel < ROTARY // 2, channel < ROTARY
    x += head * x_head
    own = tl.load(x + channel, mask, 0.0).to(tl.float32)
    partner = tl.where(is_first, channel + ROTARY // 2, channel - ROTARY // 2)
    other = tl.load(x + partner, mask & is_turned, 0.0).to(tl.float32)
    # Each product is rounded before the sum, as PyTorch rounds it.
    rounded = cos.dtype.element_ty
    own = (own * tl.load(cos + channel, is_turned, 1.0).to(tl.float32)).to(rounded).to(tl.float32)
    other = (other * tl.load(sin + channel, is_turned, 0.0).to(tl.float32)).to(rounded).to(tl.float32)
    return (own + tl.where(is_first, -other, other)).to(dtype).to(tl.float32)


@triton.jit
def _store_new(
    key, value, key_head, value_head, cos, sin, keys, values, page_table, position, shared, K,
    D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Write the new token's rotated key and its value to the cache, and return them, fp32 (PADDED,)."""
    channel = tl.arange(0, PADDED)
    dtype = keys.dtype.element_ty
    mask = channel < D
    k = _rotated(key, key_head, shared, channel, mask, cos, sin, dtype, ROTARY)
    v = tl.load(value + shared * value_head + channel, mask, 0.0)
    slot = tl.load(page_table + position // PAGE).to(tl.int64) * PAGE + position % PAGE
    tl.store(keys + slot * K * D + channel, k.to(dtype), mask)
    tl.store(values + slot * K * D + channel, v.to(dtype), mask)
    return k, v.to(tl.float32)


@triton.jit
def _decode_by_rows(
    q, new_key, new_value, has_new, keys, values, page_table, begin, end, K, scale,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return maximum, sum and result of the softmax, (GROUP,) twice and (GROUP, PADDED).

    q: fp32 (GROUP, 1, PADDED). If `has_new`, the key and value of a token that is not read from the cache are in the
    softmax of the first row of the tile.
    """
    channel = tl.arange(0, PADDED)[None, None, :]
    holds_new = has_new & (tl.arange(0, KEYS)[None, :] == 0)
    score = _capped(tl.sum(q * new_key[None, None, :], 2), scale, SOFTCAP)
    highest = tl.where(holds_new, score, tl.full((GROUP, KEYS), LOWEST, tl.float32))
    total = tl.where(holds_new, 1.0, tl.zeros((GROUP, KEYS), tl.float32))
    result = tl.where(
        holds_new[:, :, None], new_value[None, None, :], tl.zeros((GROUP, KEYS, PADDED), tl.float32)
    )
    for block in tl.range(begin, end, KEYS, num_stages=STAGES):
        j = block + tl.arange(0, KEYS)
        offsets = (_slots(page_table, j, end, PAGE) * K * D)[None, :, None] + channel
        seen = (j < end)[None, :, None] & (channel < D)
        k = tl.load(keys + offsets, seen, 0.0).to(tl.float32)
        v = tl.load(values + offsets, seen, 0.0).to(tl.float32)
        scores = _capped(tl.sum(q * k, 2), scale, SOFTCAP)
        scores = tl.where((j < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, scores)
        weights, shrink = tl.exp2(scores - higher), tl.exp2(highest - higher)
        total = total * shrink + weights
        result = result * shrink[:, :, None] + weights[:, :, None] * v
        highest = higher
    top = tl.max(highest, 1)
    weights = tl.exp2(highest - top[:, None])
    return top, tl.sum(total * weights, 1), tl.sum(result * weights[:, :, None], 1)


@triton.jit
def _attend(
    q, highest, total, result, queries_end, keys, values, page_table, begin, end, window, K, scale,
    ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Continue a softmax of which maximum, sum and result are given, (ROWS,) twice and (ROWS, PADDED).

    q: (ROWS, PADDED). queries_end: (ROWS,), the position after each query: it attends to the last `window` keys before.
    """
    channel = tl.arange(0, PADDED)[None, :]
    for block in range(begin, end, KEYS):
        j = block + tl.arange(0, KEYS)
        offsets = (_slots(page_table, j, end, PAGE) * K * D)[:, None] + channel
        seen = (j < end)[:, None] & (channel < D)
        k = tl.load(keys + offsets, seen, 0.0)
        v = tl.load(values + offsets, seen, 0.0)
        scores = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, SOFTCAP)
        visible = (j[None, :] < queries_end[:, None]) & (j[None, :] >= queries_end[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    return highest, total, result


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    query, key, value, cos, sin, keys, values, page_table, lengths, out, partials, logsumexp,
    query_sequence, query_head, key_sequence, key_head, value_sequence, value_head, cos_sequence, sin_sequence,
    table_sequence, window, scale, K, splits,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    ROTARY: tl.constexpr, IS_WHOLE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BY_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """ROTARY: 0 if the newest token is in the cache; otherwise query and key are to be rotated, and key and value
    to be written to the cache by the program whose part ends with them."""
    split, shared, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, length, step = _part(lengths, sequence, window, splits, KEYS)
    begin += split * step
    if split > 0 and begin >= length:
        return
    end = tl.minimum(begin + step, length)
    has_new = (ROTARY > 0) & (length > 0) & (end == length)
    query += sequence * query_sequence + shared * GROUP * query_head
    keys += shared * D
    values += shared * D
    page_table += sequence * table_sequence
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED)[None, :]
    mask = (row < GROUP)[:, None] & (channel < D)
    new_key, new_value = tl.zeros((PADDED,), tl.float32), tl.zeros((PADDED,), tl.float32)
    if ROTARY > 0:
        cos += sequence * cos_sequence
        sin += sequence * sin_sequence
        q = _rotated(query, query_head, row[:, None], channel, mask, cos, sin, keys.dtype.element_ty, ROTARY)
        if has_new:
            new_key, new_value = _store_new(
                key + sequence * key_sequence, value + sequence * value_sequence, key_head, value_head, cos, sin,
                keys, values, page_table, length - 1, shared, K, D, PADDED, PAGE, ROTARY,
            )  # fmt: skip
            end -= 1
    else:
        q = tl.load(query + row[:, None] * query_head + channel, mask, 0.0).to(tl.float32)
    if BY_ROWS:
        highest, total, result = _decode_by_rows(
            q[:, None, :], new_key, new_value, has_new, keys, values, page_table, begin, end, K, scale,
            GROUP, D, PADDED, PAGE, SOFTCAP, KEYS, STAGES,
        )  # fmt: skip
    else:
        score = _capped(tl.sum(q * new_key[None, :], 1), scale, SOFTCAP)
        highest = tl.where(has_new, score, tl.full((ROWS,), LOWEST, tl.float32))
        total = tl.where(has_new, 1.0, tl.zeros((ROWS,), tl.float32))
        result = tl.where(has_new, new_value[None, :], tl.zeros((ROWS, PADDED), tl.float32))
        highest, total, result = _attend(
            q.to(keys.dtype.element_ty), highest, total, result, tl.zeros_like(row) + end,
            keys, values, page_table, begin, end, window, K, scale, ROWS, D, PADDED, PAGE, SOFTCAP, KEYS,
        )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)  # padding, without keys: the result is zero
    result = result / total[:, None]
    head = (sequence * K + shared) * GROUP + row
    if IS_WHOLE:
        tl.store(out + head[:, None] * D + channel, result.to(out.dtype.element_ty), mask)
    else:
        tl.store(partials + (head * splits + split)[:, None] * D + channel, result, mask)
        tl.store(logsumexp + head * splits + split, highest + tl.log2(total), row < GROUP)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partials, logsumexp, lengths, out, window, H, splits,
    D: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one head, weighted by their share of the softmax's sum. PARTS: splits padded."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, end, step = _part(lengths, sequence, window, splits, KEYS)
    split, channel = tl.arange(0, PARTS), tl.arange(0, PADDED)
    used = split < tl.maximum(tl.cdiv(end - begin, step), 1)
    head += sequence * H
    heights = tl.load(logsumexp + head * splits + split, used, float("-inf"))
    weights = tl.exp2(heights - tl.max(heights, 0))
    mask = used[:, None] & (channel < D)[None, :]
    parts = tl.load(partials + (head * splits + split)[:, None] * D + channel[None, :], mask, 0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * D + channel, result.to(out.dtype.element_ty), channel < D)


@triton.jit(do_not_specialize=["S"])
def prefill_kernel(
    query, keys, values, page_table, bounds, lengths, out,
    query_token, query_head, table_sequence, window, scale, S, K,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    SEQUENCES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS // GROUP new tokens of one sequence with the GROUP heads of one key head."""
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, shared = tl.program_id(0), tl.program_id(1)
    # Sequence s has the tiles from bounds[s] // TOKENS + s on, enough for any length; a surplus one returns.
    every = tl.arange(0, SEQUENCES)
    first_tiles = tl.load(bounds + every, every < S, 0) // TOKENS + every
    sequence = tl.sum(((first_tiles <= tile) & (every < S)).to(tl.int32), 0) - 1
    begin, end, length = (
        tl.load(bounds + sequence),
        tl.load(bounds + sequence + 1),
        tl.load(lengths + sequence),
    )
    first = (tile - begin // TOKENS - sequence) * TOKENS
    if first >= end - begin:
        return
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED)[None, :]
    token = first + row // GROUP
    head = shared * GROUP + row % GROUP
    real = (row < TOKENS * GROUP) & (token < end - begin)
    mask = real[:, None] & (channel < D)
    place = (begin + token).to(tl.int64)
    q = tl.load(query + (place * query_token + head * query_head)[:, None] + channel, mask, 0.0)
    before = length - (end - begin)  # cached tokens before the new ones
    queries_end = before + token + 1
    keys_end = tl.minimum(before + first + TOKENS, length)
    keys_begin = tl.maximum(before + first + 1 - window, 0)
    _, total, result = _attend(
        q, tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, PADDED), tl.float32), queries_end, keys + shared * D, values + shared * D,
        page_table + sequence.to(tl.int64) * table_sequence, keys_begin, keys_end, window, K, scale,
        ROWS, D, PADDED, PAGE, SOFTCAP, KEYS,
    )  # fmt: skip
    result = result / tl.where(real, total, 1.0)[:, None]
    target = out + ((place * K * GROUP + head) * D)[:, None] + channel
    tl.store(target, result.to(out.dtype.element_ty), mask)


PROGRAMS = 1024
"""Programs that keep a GPU's memory busy: about 8 per multiprocessor of an H200."""

MOST_SPLITS = 64
EVERYTHING = 2**30
"""The window of attention without one."""


def splits_for(pairs: int, longest: int) -> int:
    """Return the parts per sequence. pairs: sequences times key heads; longest: tokens that a sequence may have."""
    wanted = min(triton.cdiv(PROGRAMS, max(1, pairs)), triton.cdiv(longest, 64), MOST_SPLITS)
    return triton.next_power_of_2(max(1, wanted))


def decode_layout(group: int, channels: int, item_bytes: int, capability: int) -> dict[str, int | bool]:
    """Return the constants of `decode_kernel` that depend on the heads, its warps and stages.

    By rows: the best of 44 on one H200 for 32 heads of 96 channels in bf16, 64 sequences of 200 tokens: 53 us.
    """
    by_rows = group <= 2
    size = 8192 if capability >= 80 else 4096  # of a tile in 16 bits
    keys = 16 if by_rows else size * 2 // item_bytes // triton.next_power_of_2(channels)
    return {
        "ROWS": group if by_rows else max(LEAST_ROWS, triton.next_power_of_2(group)),
        "KEYS": max(16, min(64, keys)),
        "BY_ROWS": by_rows,
        "STAGES": 3 if item_bytes == 2 else 2,
        "num_warps": 2 if by_rows and group * channels <= 128 else 4,
        "num_stages": 3 if item_bytes == 2 else 2,
    }


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
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the attention of one query per sequence to its cached tokens, (S, H, D).

    new: key, value, cos and sin of the newest tokens, if they are still to be rotated, as the query, and cached.
    """
    (query,) = dense_channels(query)
    rotary, key, value, cos, sin = 0, query, query, query, query
    if new is not None:
        key, value = dense_channels(*new[:2])
        cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in new[2:])
        rotary = cos.shape[1]
    (sequences, heads, channels), (_, page, shared, _) = query.shape, keys.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not sequences:
        return out
    if splits is None:
        longest = page_table.shape[1] * page
        splits = splits_for(sequences * shared, longest if window is None else min(window, longest))
    partials, logsumexp = out, out  # not used by a single part
    if splits > 1:
        partials, logsumexp = (
            torch.empty(sequences, heads, splits, n, dtype=torch.float32, device=query.device)
            for n in (channels, 1)
        )
    padded, window = triton.next_power_of_2(channels), window or EVERYTHING
    options = decode_layout(heads // shared, channels, keys.element_size(), _capability(query))
    lengths, page_table = (
        lengths.contiguous(),
        page_table if page_table.stride(1) == 1 else page_table.contiguous(),
    )
    with torch.cuda.device_of(query):
        decode_kernel[(splits, shared, sequences)](
            *(query, key, value, cos, sin, keys.view(-1), values.view(-1)),
            *(page_table, lengths, out, partials, logsumexp),
            *(*strides(query, key, value), cos.stride(0), sin.stride(0)),
            *(page_table.stride(0), window, scale, shared, splits),
            *(heads // shared, channels, padded, page, softcap or 0.0, rotary, splits == 1),
            **options,
        )
        if splits > 1:
            parts = triton.next_power_of_2(splits)
            merge_kernel[(heads, sequences)](
                *(partials, logsumexp, lengths, out, window, heads, splits, channels, padded, parts),
                KEYS=options["KEYS"],
                num_warps=max(1, min(16, parts * padded // 512)),
            )
    return out


def prefill_layout(group: int, channels: int, item_bytes: int, capability: int) -> dict[str, int]:
    """Return the constants of `prefill_kernel` that depend on the heads, its warps and stages."""
    block = block_size(channels, item_bytes, capability)
    rows, keys = (
        (64, block) if capability >= 90 else (64, min(32, block)) if capability >= 80 else (block, block)
    )
    is_small = triton.next_power_of_2(channels) * item_bytes <= 256
    return {
        "ROWS": max(rows, triton.next_power_of_2(group)),
        "KEYS": keys,
        "num_warps": 4 if is_small or capability < 80 else 8,
        "num_stages": 2 if capability >= 80 else 1,
    }


def _capability(x: torch.Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


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
    """Return the attention of several new tokens per sequence to its cached tokens, (T, H, D)."""
    (query,) = dense_channels(query)
    (tokens, heads, channels), (_, page, shared, _) = query.shape, keys.shape
    sequences, group = len(lengths), heads // shared
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    if not tokens or not sequences:
        return out
    options = prefill_layout(group, channels, keys.element_size(), _capability(query))
    page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    with torch.cuda.device_of(query):
        prefill_kernel[(tokens // (options["ROWS"] // group) + sequences, shared)](
            *(
                query,
                keys.view(-1),
                values.view(-1),
                page_table,
                bounds.contiguous(),
                lengths.contiguous(),
                out,
            ),
            *(*strides(query), page_table.stride(0), window or EVERYTHING, scale, sequences, shared),
            *(group, channels, triton.next_power_of_2(channels), page, softcap or 0.0),
            max(256, triton.next_power_of_2(sequences)),
            **options,
        )
    return out
