"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4)."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: bool = False) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32 and returned in x's dtype.

    x: (..., hidden); weight: (hidden,). With `offset` the weight is stored as its distance from one and
    the product is taken before rounding (Gemma); without, the normalised x is rounded first (Llama).
    """
    x_fp32 = x.float()
    normalised = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normalised * (1.0 + weight.float())).to(x.dtype)
    return weight * normalised.to(x.dtype)
