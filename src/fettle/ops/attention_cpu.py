"""Attention in tiles of queries, in plain PyTorch: memory is one tile, never tokens^2.

A tile is one block of queries with all keys that it attends to: at most window + block keys with a sliding window.
Backward recomputes it from the logsumexp of its rows (FlashAttention-2, arXiv 2307.08691, section 2.3):

    scores = scale * q k^T,  weights = exp(scores - logsumexp),  delta = sum(grad * out)
    grad_scores = weights * (grad v^T - delta),  times 1 - (scores / softcap)^2 with a soft cap

Forward, scores and their gradients are computed in fp32, the other products of backward in the inputs' dtype.
The query heads that share a key head are rows of one product, so no key is repeated.

Shapes: B documents times key-value heads, G query heads per key-value head, N tokens, D channels. In a tile: b of the
B, q queries, k keys.
"""

import math
from typing import NamedTuple

import torch

BLOCK = 128
"""Queries per tile: fewer give inefficient products, more waste work above the diagonal."""

TILE_SCORES = 1 << 20
"""Target for the scores per tile (4 MB in fp32), so that a tile stays in the cache."""


class Rules(NamedTuple):
    """softmax(scale * q k^T) over the last `window` tokens; scores capped to softcap * tanh(s / softcap).

    is_causal: query i attends to the keys up to i; otherwise to all keys, of which there may be another number.
    """

    scale: float
    window: int | None
    softcap: float | None
    is_causal: bool = True


class Tile(NamedTuple):
    """The slices of heads, queries and keys of one tile."""

    batch: slice
    queries: slice
    keys: slice


def tiled_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out, shaped as query, and the logsumexp of the scores, (B, G, N).

    query: (B, G, N, D); key, value: (B, N, D), or any number of keys if the rules are not causal.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    logsumexp = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    tiles = _tiles(query, key.shape[1], rules)
    scratch = _scratch(query, tiles, wide)
    for tile in tiles:
        rows = query[tile.batch, :, tile.queries]  # (b, G, q, D)
        scores = _scores(rows, key[tile.batch, tile.keys], rules, scratch)  # (b, G * q, k)
        if rules.is_causal:
            hidden = _hidden(tile, rules.window, query.device)
            scores.unflatten(1, rows.shape[1:3]).masked_fill_(hidden, -torch.inf)
        highest = scores.amax(-1)
        weights = torch.softmax(scores, -1, out=scores)
        # The largest weight is exp(highest - logsumexp), so the softmax gives the logsumexp without a second pass.
        row_logsumexp = highest - weights.amax(-1).log_()  # (b, G * q)
        logsumexp[tile.batch, :, tile.queries] = row_logsumexp.view(rows.shape[:3])
        product = torch.bmm(weights, value[tile.batch, tile.keys].to(wide))  # (b, G * q, D)
        out[tile.batch, :, tile.queries] = product.view(rows.shape)
    return out, logsumexp


def tiled_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    rules: Rules,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, given that of out and the results of forward."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    # Several tiles add to the same keys and values, so their sums are in fp32.
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    tiles = _tiles(query, key.shape[1], rules)
    scratch, grad_scratch, narrow_scratch = (_scratch(query, tiles, t) for t in (wide, wide, query.dtype))
    for tile in tiles:
        rows, grad_rows, out_rows = (
            x[tile.batch, :, tile.queries] for x in (query, grad, out)
        )  # (b, G, q, D)
        keys, values = key[tile.batch, tile.keys], value[tile.batch, tile.keys]  # (b, k, D)
        row_logsumexp = logsumexp[tile.batch, :, tile.queries].flatten(1)[..., None]  # (b, G * q, 1)
        grad_rows = grad_rows.flatten(1, 2)  # (b, G * q, D)
        # sum_j weight_j * (grad v_j): what the softmax's gradient subtracts, from D instead of k products
        delta = (grad_rows.to(wide) * out_rows.flatten(1, 2)).sum(-1, keepdim=True)  # (b, G * q, 1)

        scores = _scores(rows, keys, rules, scratch)  # (b, G * q, k), overwritten by the weights below
        slope = None if rules.softcap is None else (scores / rules.softcap).square_().neg_().add_(1)
        weights = scores.sub_(row_logsumexp).exp_()
        if rules.is_causal:
            hidden = _hidden(tile, rules.window, query.device)
            weights.unflatten(1, rows.shape[1:3]).masked_fill_(hidden, 0)
        grad_scores = grad_scratch[: scores.numel()].view(scores.shape)
        torch.bmm(grad_rows.to(wide), values.to(wide).mT, out=grad_scores).sub_(delta).mul_(weights)
        if slope is not None:
            grad_scores.mul_(slope)

        # The products below run in the inputs' dtype; one buffer holds the rounded weights, then the gradient.
        narrow = narrow_scratch[: scores.numel()].view(scores.shape)
        narrow.copy_(weights)
        grad_value[tile.batch, tile.keys] += torch.bmm(narrow.mT, grad_rows)
        narrow.copy_(grad_scores.mul_(rules.scale))
        grad_query[tile.batch, :, tile.queries] = torch.bmm(narrow, keys).view(rows.shape)
        grad_key[tile.batch, tile.keys] += torch.bmm(narrow.mT, rows.flatten(1, 2))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _tiles(query: torch.Tensor, keys: int, rules: Rules) -> list[Tile]:
    batch, groups, tokens, _ = query.shape
    tiles = []
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        seen = slice(0, keys)
        if rules.is_causal:
            seen = slice(0 if rules.window is None else max(0, first - rules.window + 1), last)
        heads = max(1, TILE_SCORES // (groups * (last - first) * (seen.stop - seen.start)))
        for head in range(0, batch, heads):
            tiles.append(Tile(slice(head, min(head + heads, batch)), slice(first, last), seen))
    return tiles


def _scratch(query: torch.Tensor, tiles: list[Tile], dtype: torch.dtype) -> torch.Tensor:
    """Return a buffer for the scores of the largest tile."""
    scores = max(math.prod(side.stop - side.start for side in tile) for tile in tiles)
    return torch.empty(query.shape[1] * scores, dtype=dtype, device=query.device)


def _scores(rows: torch.Tensor, keys: torch.Tensor, rules: Rules, scratch: torch.Tensor) -> torch.Tensor:
    """Return the scores (b, G * q, k), in `scratch`. rows: (b, G, q, D); keys: (b, k, D)."""
    rows = rows.flatten(1, 2).to(scratch.dtype) * rules.scale
    scores = scratch[: rows.shape[0] * rows.shape[1] * keys.shape[1]].view(*rows.shape[:2], keys.shape[1])
    torch.bmm(rows, keys.to(scratch.dtype).mT, out=scores)
    if rules.softcap is not None:
        scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
    return scores


def _hidden(tile: Tile, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (q, k), False where query i attends to key j: i - window < j <= i."""
    i = torch.arange(tile.queries.start, tile.queries.stop, device=device)[:, None]
    j = torch.arange(tile.keys.start, tile.keys.stop, device=device)
    return j > i if window is None else (j > i) | (j <= i - window)
