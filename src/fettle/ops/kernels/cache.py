# mypy: allow-untyped-defs, allow-incomplete-defs
"""New tokens written to their slots of a paged cache, rotated on the way: one launch for query, key and value.

Shapes: T new tokens, H heads, K key-value heads, D channels. See `fettle.ops.paged_attention`.
"""

import torch
import triton
import triton.language as tl

HEADS = 8  # of one token per program


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
    """Copy key and value, (T, K, D), to their slots."""
    key, value = dense_channels(key, value)
    tokens, shared, channels = key.shape
    if tokens:
        with torch.cuda.device_of(keys):
            write_cache_kernel[(tokens, triton.cdiv(shared, HEADS))](
                *(key, value, keys.view(-1), values.view(-1), slots.contiguous(), *strides(key, value)),
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
    query, key, value = dense_channels(query, key, value)
    cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (cos, sin))
    (tokens, heads, channels), shared, rotary = query.shape, key.shape[1], cos.shape[1]
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if tokens:
        with torch.cuda.device_of(keys):
            programs = triton.cdiv(heads, HEADS) + 2 * triton.cdiv(shared, HEADS)
            rotate_and_cache_kernel[(tokens, programs)](
                *(query, key, value, cos, sin, rotated, keys.view(-1), values.view(-1), slots.contiguous()),
                *(*strides(query, key, value), cos.stride(0), sin.stride(0)),
                *(heads, shared, channels, rotary),
                *(triton.next_power_of_2(channels), HEADS),
                *(triton.next_power_of_2(rotary // 2), triton.next_power_of_2(max(1, channels - rotary))),
                num_warps=4,
            )
    return rotated


def strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def dense_channels(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors with contiguous channels; tokens and heads may have any stride."""
    return [tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in tensors]
