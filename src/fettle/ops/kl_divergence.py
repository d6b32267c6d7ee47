"""KL divergence of two distributions given as log-probabilities."""

import torch


def kl_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return KL(first || second) in nats, fp64 (...), for log-probabilities (..., vocabulary); never negative.

    Probabilities rounded to fp32 sum to 1 only within about 1e-7, so the textbook sum of p * log(p / q) can come out
    below zero for distributions that are almost equal. Every term of the generalized divergence,
    p * log(p / q) - p + q, is at least zero for any p and q, and for distributions that sum to 1 the result is the
    same.
    """
    first, second = first.double(), second.double()
    p, q = first.exp(), second.exp()
    ratio = torch.where(p > 0, first - second, 0.0)  # p = 0 gives a term of zero instead of NaN
    return (p * ratio - p + q).sum(-1).clamp_min(0)
