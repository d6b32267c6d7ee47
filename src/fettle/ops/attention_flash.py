"""FlashAttention-2's CUDA kernels (arXiv 2307.08691), as shipped in PyTorch, over concatenated documents.

The fastest implementation on Ampere and later; it does not support a soft cap. Its backward accumulates with atomics,
so the last bits may differ between runs unless `torch.use_deterministic_algorithms(True)` is set.
"""

import torch

from fettle.ops.attention_cpu import Rules
from fettle.ops.shared_prefix import Prefixes


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    rules: Rules,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out, (T, H, D), and the logsumexp of the scores, (H, T).

    query: (T, H, D); key, value: (T, K, D). bounds: int32, the starts of the documents, and T. longest: in tokens.
    """
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, bounds, bounds, longest, longest, 0.0, True, False), **_options(rules)
    )
    return out, logsumexp


def cudnn_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Return causal attention within one document, (T, H, D), by cuDNN. query, key, value: (T, H, D), any strides.

    Faster than FlashAttention-2 on Hopper: 32 heads of 96 channels, 4,096 tokens on one H200, 0.26 and 0.39 ms.
    """
    batch = (x.transpose(0, 1)[None] for x in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: torch.Tensor = attend(*batch, None, False, 0.0, True, False, scale=scale)[0]
    return out[0].transpose(0, 1)


def flash_backward(
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    bounds: torch.Tensor,
    longest: int,
    rules: Rules,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value. saved: query, key, value, out, logsumexp."""
    random = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # required, but not read without dropout
    grads = torch.ops.aten._flash_attention_backward(
        *(grad.contiguous(), *saved, bounds, bounds, longest, longest, 0.0, True, random, random),
        **_options(rules),
    )
    return grads[0], grads[1], grads[2]


def _options(rules: Rules) -> dict[str, float | int]:
    windows = {} if rules.window is None else {"window_size_left": rules.window - 1, "window_size_right": 0}
    return {"scale": rules.scale, **windows}


def flash_prefix_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefixes: Prefixes, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention to the shared tokens, (T, H, D), and its logsumexp, (H, T): -inf where there are none."""
    bounds = (prefixes.query_bounds, prefixes.key_bounds, prefixes.longest_query, prefixes.longest_key)
    out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, *bounds, 0.0, False, False), scale=scale
    )
    return out, logsumexp.masked_fill(~prefixes.continues, -torch.inf)


def flash_prefix_backward(
    grad: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    prefixes: Prefixes,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what the attention to the shared tokens adds to the gradients of query, key and value.

    saved: query, key, value, and the merged out and logsumexp.
    """
    query, key, value, out, logsumexp = saved
    # weights are exp(score - logsumexp): 0 for tokens that attend to nothing shared
    logsumexp = logsumexp.masked_fill(~prefixes.continues, torch.inf)
    random = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    bounds = (prefixes.query_bounds, prefixes.key_bounds, prefixes.longest_query, prefixes.longest_key)
    grads = torch.ops.aten._flash_attention_backward(
        *(grad.contiguous(), query, key, value, out, logsumexp, *bounds, 0.0, False, random, random),
        scale=scale,
    )
    return grads[0], grads[1], grads[2]
