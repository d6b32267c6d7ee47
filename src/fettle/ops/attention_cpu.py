"""Causal attention in tiles of queries, in plain PyTorch: memory is one tile, never tokens^2.

A tile is one block of queries and every key it can see: with a window that is at most window + block keys.
It is made anew in backward from the logsumexp of its rows (FlashAttention-2, arXiv 2307.08691, section 2.3):

    scores = scale * q k^T,  weights = exp(scores - logsumexp),  delta = sum(grad * out)
    grad_scores = weights * (grad v^T - delta),  times 1 - (scores / softcap)^2 with a soft cap

Forward, scores and their gradients are computed in fp32, the other products of backward in the inputs' dtype.
The query heads that share a key head lie side by side as rows of one product, so no key is repeated.

Shapes: B documents times key-value heads, G query heads a key-value head, N tokens, D channels.
"""

import math
from typing import NamedTuple

import torch

BLOCK = 128
"""Queries a tile: fewer make narrow products, more waste work above the diagonal."""

TILE_SCORES = 1 << 20
"""Scores a tile where there is a choice (4 MB in fp32), so that a tile stays in the cache."""


class Rules(NamedTuple):
    """softmax(scale * q k^T) over the last `window` tokens; scores capped to softcap * tanh(s / softcap)."""

    scale: float
    window: int | None
    softcap: float | None


class Tile(NamedTuple):
    """Which heads, queries and keys."""

    batch: slice
    queries: slice
    keys: slice


def tiled_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out, as query, and the logsumexp of the scores, (B, G, N).

    query: (B, G, N, D); key, value: (B, N, D).
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    logsumexp = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    tiles = _tiles(query, rules.window)
    scratch = _scratch(query, tiles, wide)
    for tile in tiles:
        rows = query[tile.batch, :, tile.queries]
        scores = _scores(rows, key[tile.batch, tile.keys], rules, scratch)
        scores.unflatten(1, rows.shape[1:3]).masked_fill_(
            _hidden(tile, rules.window, query.device), -torch.inf
        )
        highest = scores.amax(-1)
        weights = torch.softmax(scores, -1, out=scores)
        # The highest score's weight is exp(highest - logsumexp).
        row_logsumexp = highest - weights.amax(-1).log_()
        logsumexp[tile.batch, :, tile.queries] = row_logsumexp.view(rows.shape[:3])
        product = torch.bmm(weights, value[tile.batch, tile.keys].to(wide))
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
    """Return the gradients of query, key and value, given that of out and what forward returned."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (key, value))
    tiles = _tiles(query, rules.window)
    scratch, grad_scratch, narrow_scratch = (_scratch(query, tiles, t) for t in (wide, wide, query.dtype))
    for tile in tiles:
        rows, grad_rows, out_rows = (x[tile.batch, :, tile.queries] for x in (query, grad, out))
        keys, values = key[tile.batch, tile.keys], value[tile.batch, tile.keys]
        row_logsumexp = logsumexp[tile.batch, :, tile.queries].flatten(1)[..., None]
        grad_rows = grad_rows.flatten(1, 2)
        delta = (grad_rows.to(wide) * out_rows.flatten(1, 2)).sum(-1, keepdim=True)

        scores = _scores(rows, keys, rules, scratch)
        slope = None if rules.softcap is None else (scores / rules.softcap).square_().neg_().add_(1)
        weights = scores.sub_(row_logsumexp).exp_()
        hidden = _hidden(tile, rules.window, query.device)
        weights.unflatten(1, rows.shape[1:3]).masked_fill_(hidden, 0)
        grad_scores = grad_scratch[: scores.numel()].view(scores.shape)
        torch.bmm(grad_rows.to(wide), values.to(wide).mT, out=grad_scores).sub_(delta).mul_(weights)
        if slope is not None:
            grad_scores.mul_(slope)

        narrow = narrow_scratch[: scores.numel()].view(scores.shape)
        narrow.copy_(weights)
        grad_value[tile.batch, tile.keys] += torch.bmm(narrow.mT, grad_rows)
        narrow.copy_(grad_scores.mul_(rules.scale))
        grad_query[tile.batch, :, tile.queries] = torch.bmm(narrow, keys).view(rows.shape)
        grad_key[tile.batch, tile.keys] += torch.bmm(narrow.mT, rows.flatten(1, 2))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _tiles(query: torch.Tensor, window: int | None) -> list[Tile]:
    batch, groups, tokens, _ = query.shape
    tiles = []
    for first in range(0, tokens, BLOCK):
        last = min(first + BLOCK, tokens)
        earliest = 0 if window is None else max(0, first - window + 1)
        heads = max(1, TILE_SCORES // (groups * (last - first) * (last - earliest)))
        for head in range(0, batch, heads):
            tiles.append(
                Tile(slice(head, min(head + heads, batch)), slice(first, last), slice(earliest, last))
            )
    return tiles


def _scratch(query: torch.Tensor, tiles: list[Tile], dtype: torch.dtype) -> torch.Tensor:
    """Room for the largest tile's scores."""
    scores = max(math.prod(side.stop - side.start for side in tile) for tile in tiles)
    return torch.empty(query.shape[1] * scores, dtype=dtype, device=query.device)


def _scores(rows: torch.Tensor, keys: torch.Tensor, rules: Rules, scratch: torch.Tensor) -> torch.Tensor:
    """(b, G * queries, keys), in the scratch. rows: (b, G, queries, D); keys: (b, keys, D)."""
    rows = rows.flatten(1, 2).to(scratch.dtype) * rules.scale
    scores = scratch[: rows.shape[0] * rows.shape[1] * keys.shape[1]].view(*rows.shape[:2], keys.shape[1])
    torch.bmm(rows, keys.to(scratch.dtype).mT, out=scores)
    if rules.softcap is not None:
        scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
    return scores


def _hidden(tile: Tile, window: int | None, device: torch.device) -> torch.Tensor:
    """(queries, keys), False where query i may see key j: i - window < j <= i."""
    i = torch.arange(tile.queries.start, tile.queries.stop, device=device)[:, None]
    j = torch.arange(tile.keys.start, tile.keys.stop, device=device)
    return j > i if window is None else (j > i) | (j <= i - window)
