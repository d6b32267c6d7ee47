# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rotary embedding on the GPU: a program rotates eight heads of one token, at any strides."""

import torch
import triton
import triton.language as tl

HEADS = 8


@triton.jit
def rotary_kernel(
    x,
    x_batch,
    x_head,
    x_token,
    x_channel,
    cos,
    cos_batch,
    cos_token,
    sin,
    sin_batch,
    sin_token,
    output,
    output_batch,
    output_head,
    output_token,
    output_channel,
    heads,
    half,
    IS_INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, BLOCK)
    in_half = channel < half
    mask = (head < heads) & in_half[None, :]
    dtype = output.dtype.element_ty

    cos += batch * cos_batch + token * cos_token + channel
    sin += batch * sin_batch + token * sin_token + channel
    cos_first = tl.load(cos, in_half, 0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + half, in_half, 0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin, in_half, 0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + half, in_half, 0.0).to(tl.float32)[None, :]
    if IS_INVERSE:
        sin_first, sin_second = -sin_second, -sin_first

    x += batch * x_batch + token * x_token + head * x_head + channel[None, :] * x_channel
    first = tl.load(x, mask, 0.0).to(tl.float32)
    second = tl.load(x + half * x_channel, mask, 0.0).to(tl.float32)
    # Each product is rounded before the sum, as PyTorch rounds it.
    turned_first = (first * cos_first).to(dtype).to(tl.float32) - (second * sin_first).to(dtype).to(
        tl.float32
    )
    turned_second = (second * cos_second).to(dtype).to(tl.float32) + (first * sin_second).to(dtype).to(
        tl.float32
    )
    output += batch * output_batch + token * output_token + head * output_head
    output += channel[None, :] * output_channel
    tl.store(output, turned_first.to(dtype), mask)
    tl.store(output + half * output_channel, turned_second.to(dtype), mask)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, output: torch.Tensor, *, is_inverse: bool
) -> None:
    """Write the first `cos.shape[-1]` channels of x, rotated (back, if inverse), to `output`.

    x, output: (batch, heads, tokens, head_dim); cos, sin: (batch or 1, tokens, rotary_dim).
    """
    batch, heads, tokens, _ = x.shape
    cos, sin = (t.contiguous().expand(batch, tokens, -1) for t in (cos, sin))
    half = cos.shape[-1] // 2
    if x.numel() and half:
        with torch.cuda.device_of(x):
            rotary_kernel[(tokens, batch, triton.cdiv(heads, HEADS))](
                *(x, *x.stride(), cos, *cos.stride()[:2], sin, *sin.stride()[:2]),
                *(output, *output.stride(), heads, half, is_inverse, HEADS, triton.next_power_of_2(half)),
                num_warps=4,
            )
