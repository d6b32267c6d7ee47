# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention over a paged cache in Triton: new tokens written to their slots, and read by decode and prefill.

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

HEADS = 8  # heads of one token per program, when writing
LEAST_ROWS = 16  # of a product on the matrix units
LOWEST = tl.constexpr(
    -1.0e30
)  # finite, so that a row without visible keys gives exp2(-inf - LOWEST) = 0, not NaN
LOG2_E = tl.constexpr(1.4426950408889634)  # scores are in units of log 2, as exp2 is faster than exp

# --- write -------------------------------------------------------------------------------------------------


@triton.jit
def _copy(
    source,
    source_head,
    target,
    first,
    heads,
    start,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the channels from `start` of HEADS heads; in `target` they are contiguous."""
    head = (first + tl.arange(0, HEADS))[:, None]
    channel = start + tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (channel < D)
    x = tl.load(source + head * source_head + channel, mask, 0.0)
    tl.store(target + head * D + channel, x.to(target.dtype.element_ty), mask)


@triton.jit
def _rotate(
    source, source_head, target, first, heads, cos, sin,
    D: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads as `kernels.rotary` does; channels from ROTARY on are copied."""
    head = (first + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, HALF)[None, :]
    in_half = channel < ROTARY // 2
    mask = (head < heads) & in_half
    dtype = cos.dtype.element_ty
    cos_first = tl.load(cos + channel, in_half, 0.0).to(tl.float32)
    cos_second = tl.load(cos + ROTARY // 2 + channel, in_half, 0.0).to(tl.float32)
    sin_first = tl.load(sin + channel, in_half, 0.0).to(tl.float32)
    sin_second = tl.load(sin + ROTARY // 2 + channel, in_half, 0.0).to(tl.float32)
    x = source + head * source_head + channel
    a = tl.load(x, mask, 0.0).to(tl.float32)
    b = tl.load(x + ROTARY // 2, mask, 0.0).to(tl.float32)
    # Each product is rounded before the sum, as PyTorch rounds it.
    turned_a = (a * cos_first).to(dtype).to(tl.float32) - (b * sin_first).to(dtype).to(tl.float32)
    turned_b = (b * cos_second).to(dtype).to(tl.float32) + (a * sin_second).to(dtype).to(tl.float32)
    y = target + head * D + channel
    tl.store(y, turned_a.to(target.dtype.element_ty), mask)
    tl.store(y + ROTARY // 2, turned_b.to(target.dtype.element_ty), mask)
    if ROTARY < D:
        _copy(source, source_head, target, first, heads, ROTARY, D, HEADS, REST)


@triton.jit
def write_cache_kernel(
    key, value, keys, values, slots, key_token, key_head, value_token, value_head, K,
    D: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        _copy(key + token * key_token, key_head, keys + slot * K * D, first, K, 0, D, HEADS, PADDED)
        _copy(value + token * value_token, value_head, values + slot * K * D, first, K, 0, D, HEADS, PADDED)


@triton.jit
def rotate_and_cache_kernel(
    query, key, value, cos, sin, rotated, keys, values, slots,
    query_token, query_head, key_token, key_head, value_token, value_head, cos_token, sin_token, H, K,
    D: tl.constexpr, ROTARY: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    cos += token * cos_token
    sin += token * sin_token
    slot = tl.load(slots + token).to(tl.int64)
    queries, shared = tl.cdiv(H, HEADS) * HEADS, tl.cdiv(K, HEADS) * HEADS
    if first < queries:
        target = rotated + token * H * D
        _rotate(
            query + token * query_token, query_head, target, first, H, cos, sin, D, ROTARY, HEADS, HALF, REST
        )
    elif slot >= 0:
        first -= queries
        if first < shared:
            target = keys + slot * K * D
            _rotate(
                key + token * key_token, key_head, target, first, K, cos, sin, D, ROTARY, HEADS, HALF, REST
            )
        else:
            target = values + slot * K * D
            _copy(value + token * value_token, value_head, target, first - shared, K, 0, D, HEADS, PADDED)


def write_cache(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Copy key and value, (T, K, D), to their slots. See `fettle.ops.paged_attention` for all functions here."""
    key, value = _dense_channels(key, value)
    tokens, shared, channels = key.shape
    if tokens:
        with torch.cuda.device_of(keys):
            write_cache_kernel[(tokens, triton.cdiv(shared, HEADS))](
                *(key, value, keys.view(-1), values.view(-1), slots.contiguous(), *_strides(key, value)),
                *(shared, channels, triton.next_power_of_2(channels), HEADS),
                num_warps=4,
            )


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
    """Return the rotated query, (T, H, D); write the rotated key and the value to their slots."""
    query, key, value = _dense_channels(query, key, value)
    cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (cos, sin))
    (tokens, heads, channels), shared, rotary = query.shape, key.shape[1], cos.shape[1]
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if tokens:
        with torch.cuda.device_of(keys):
            programs = triton.cdiv(heads, HEADS) + 2 * triton.cdiv(shared, HEADS)
            rotate_and_cache_kernel[(tokens, programs)](
                *(query, key, value, cos, sin, rotated, keys.view(-1), values.view(-1), slots.contiguous()),
                *(
                    *_strides(query, key, value),
                    cos.stride(0),
                    sin.stride(0),
                    heads,
                    shared,
                    channels,
                    rotary,
                ),
                *(triton.next_power_of_2(channels), HEADS),
                *(triton.next_power_of_2(rotary // 2), triton.next_power_of_2(max(1, channels - rotary))),
                num_warps=4,
            )
    return rotated


# --- read --------------------------------------------------------------------------------------------------


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
def _decode_by_rows(
    query, query_head, keys, values, page_table, begin, end, K, scale,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Return maximum, sum and result of the softmax, (GROUP,) twice and (GROUP, PADDED)."""
    head, channel = tl.arange(0, GROUP)[:, None, None], tl.arange(0, PADDED)[None, None, :]
    q = tl.load(query + head * query_head + channel, channel < D, 0.0).to(tl.float32)
    highest = tl.full((GROUP, KEYS), LOWEST, tl.float32)
    total = tl.zeros((GROUP, KEYS), tl.float32)
    result = tl.zeros((GROUP, KEYS, PADDED), tl.float32)
    for block in range(begin, end, KEYS):
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
    q, queries_end, keys, values, page_table, begin, end, window, K, scale,
    ROWS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Return maximum, sum and result of the softmax, (ROWS,) twice and (ROWS, PADDED), on the matrix units.

    q: (ROWS, PADDED). queries_end: (ROWS,), the position after each query: it attends to the last `window` keys before.
    """
    channel = tl.arange(0, PADDED)[None, :]
    highest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, PADDED), tl.float32)
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
    query, keys, values, page_table, lengths, out, partials, logsumexp,
    query_sequence, query_head, table_sequence, window, scale, K, splits,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
    IS_WHOLE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    split, shared, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end, step = _part(lengths, sequence, window, splits, KEYS)
    begin += split * step
    if split > 0 and begin >= end:
        return
    end = tl.minimum(begin + step, end)
    query += sequence * query_sequence + shared * GROUP * query_head
    keys += shared * D
    values += shared * D
    page_table += sequence * table_sequence
    row, channel = tl.arange(0, ROWS), tl.arange(0, PADDED)[None, :]
    mask = (row < GROUP)[:, None] & (channel < D)
    if BY_ROWS:
        highest, total, result = _decode_by_rows(
            query, query_head, keys, values, page_table, begin, end, K, scale,
            GROUP, D, PADDED, PAGE, SOFTCAP, KEYS,
        )  # fmt: skip
    else:
        q = tl.load(query + row[:, None] * query_head + channel, mask, 0.0)
        highest, total, result = _attend(
            q, tl.zeros_like(row) + end, keys, values, page_table, begin, end, window, K, scale,
            ROWS, D, PADDED, PAGE, SOFTCAP, KEYS,
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
        q, queries_end, keys + shared * D, values + shared * D,
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
    """Return the constants of `decode_kernel` that depend on the heads, its warps and stages."""
    by_rows = group <= 2
    size = 4096 // group if by_rows else 8192 if capability >= 80 else 4096  # of a tile in 16 bits
    keys = size * 2 // item_bytes // triton.next_power_of_2(channels)
    return {
        "ROWS": group if by_rows else max(LEAST_ROWS, triton.next_power_of_2(group)),
        "KEYS": max(16, min(64, keys)),
        "BY_ROWS": by_rows,
        "num_warps": 4,
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
) -> torch.Tensor:
    """Return the attention of one query per sequence to its cached tokens, (S, H, D)."""
    (query,) = _dense_channels(query)
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
            *(query, keys.view(-1), values.view(-1), page_table, lengths, out, partials, logsumexp),
            *(*_strides(query), page_table.stride(0), window, scale, shared, splits),
            *(heads // shared, channels, padded, page, softcap or 0.0, splits == 1),
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
    (query,) = _dense_channels(query)
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
            *(*_strides(query), page_table.stride(0), window or EVERYTHING, scale, sequences, shared),
            *(group, channels, triton.next_power_of_2(channels), page, softcap or 0.0),
            max(256, triton.next_power_of_2(sequences)),
            **options,
        )
    return out


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _dense_channels(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with contiguous channels; tokens and heads may have any stride."""
    return [tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in tensors]
