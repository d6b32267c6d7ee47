"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864, section 3.4.2), half-split layout."""

import torch


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x with its first `cos.shape[-1]` channels rotated by their positions' angles.

    x: (batch, heads, tokens, head_dim); cos, sin: (batch, tokens, rotary_dim). Channel i is paired with
    channel i + rotary_dim / 2; channels beyond rotary_dim pass unchanged (partial rotary).
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned
