"""Causal attention over packed rows: attention within each document, without a mask.

    out = softmax(scale * q k^T) v over the keys j of the query's own document with i - window < j <= i

With `softcap` the scores s become softcap * tanh(s / softcap) first (Gemma 2, arXiv 2408.00118, section 2).

A pack is several concatenated documents. A dense mask over the whole pack would take tokens^2 memory and compute
mostly zeros. On a GPU, FlashAttention-2 takes the documents' bounds, and a Triton kernel covers what it does not
support (a soft cap, fp32, GPUs before Ampere). On a CPU, documents of similar length (the same next power of two) are
gathered into one right-padded batch: with causal attention the padding comes after every real query, so no mask is
needed. Cost: the sum of the documents' lengths squared, at most 4 times that with padding. Documents may share their
first tokens (see `shared_prefix.py`).

Saved for backward: query, key, value, out and logsumexp (one fp32 number per token and head). Recomputed: the
weights, tile by tile (FlashAttention-2, arXiv 2307.08691).

Shapes: H heads, K key-value heads (H a multiple of K), D channels per head, T tokens in all rows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fettle.ops.attention_cpu import Rules, tiled_backward, tiled_forward
from fettle.ops.attention_flash import (
    cudnn_forward,
    flash_backward,
    flash_forward,
    flash_prefix_backward,
    flash_prefix_forward,
)
from fettle.ops.dispatch import product_dtype, uses_cudnn_attention, uses_flash_attention, uses_triton
from fettle.ops.shared_prefix import Prefixes, merge

SMALLEST_GROUP = 16
"""Documents shorter than this share one group, as separate calls would cost more than the padding."""

QUERIES_AT_ONCE = 256
"""Queries per block in `softcap_attention`, whose scores take 12 bytes per pair of tokens and head."""

TILED_TOKENS = 512
"""Up to this length tiled attention is faster in bf16 than PyTorch's fused attention on a CPU. Phi-3.5's heads, forward
and backward of one layer on 2 Zen 4 cores, tiled vs. fused: 8 x 128 tokens 57 vs. 80 ms, 4 x 256 67 vs. 78 ms, 2 x 512
113 vs. 154 ms, 1 x 1024 213 vs. 168 ms. In fp32 the fused one is faster at every length (one Zen 3 core: 12 x 85 tokens
300 vs. 240 ms, 8 x 128 360 vs. 230 ms, 2 x 512 550 vs. 480 ms)."""


@dataclass(frozen=True)
class Group:
    """Documents of similar length.

    index: (documents, longest), positions in the pack, padded with each document's last position. is_real: the same
    shape, False on padding. is_whole: the group is the entire pack in order and without padding, so that gathering is
    a view.
    """

    index: torch.Tensor
    is_real: torch.Tensor
    is_whole: bool

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (T, heads, ...) as (documents, heads, longest, ...)."""
        if self.is_whole:
            return x.unflatten(0, self.index.shape).transpose(1, 2)
        # (heads, documents * longest, ...), so that a head's tokens are adjacent in memory
        chosen = x.transpose(0, 1).index_select(1, self.index.flatten())
        return chosen.unflatten(1, self.index.shape).transpose(0, 1)

    def scatter(self, found: torch.Tensor, target: torch.Tensor) -> None:
        """Write `found` (documents, heads, longest, ...), without its padding, into `target` (T, heads, ...)."""
        if self.is_whole:
            self.gather(target).copy_(found)
        else:
            rows = found.transpose(1, 2).flatten(0, 1).index_select(0, self.real)
            target.index_copy_(0, self.index.flatten().index_select(0, self.real), rows.to(target.dtype))

    @cached_property
    def real(self) -> torch.Tensor:
        """Return the positions in the flattened `index` that are not padding."""
        return self.is_real.flatten().nonzero().flatten()


@dataclass(frozen=True)
class Documents:
    """The documents of a flat row of T tokens; made once per batch, used by every layer.

    lengths: (T,), the length of each token's document, with the tokens that it shares. starts: (T,) int32, the start of
    each token's document. bounds: (documents + 1,) int32, the start of each document, and T. longest: length of the
    longest document, without shared tokens. prefixes: the shared tokens, if there are any (see `shared_prefix.py`).
    """

    lengths: torch.Tensor
    starts: torch.Tensor
    bounds: torch.Tensor
    longest: int
    prefixes: Prefixes | None = None

    @classmethod
    def from_starts(cls, is_start: torch.Tensor, shared: torch.Tensor | None = None) -> "Documents":
        """is_start: (T,) bool, True where a document begins; the first must be True. shared: (T,), at each start how
        many tokens of its root the document continues, 0 for a root; None if no document does."""
        starts = is_start.nonzero().flatten()
        bounds = torch.cat((starts, starts.new_tensor([is_start.numel()])))
        lengths, prefixes, longest = bounds.diff(), None, int(bounds.diff().max())
        whole = lengths
        if shared is not None and bool((continued := shared[starts]).any()):
            prefixes, whole = Prefixes.of(bounds, continued), lengths + continued
        per_token = torch.stack((whole, starts)).repeat_interleave(lengths, dim=1)
        return cls(per_token[0], per_token[1].int(), bounds.int(), longest, prefixes)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Return the documents grouped by similar length, for attention that takes batches; computed on demand."""
        starts, lengths = self.bounds[:-1].long(), self.bounds.diff().long()
        sizes = [max(SMALLEST_GROUP, 1 << (n - 1).bit_length()) for n in lengths.tolist()]
        groups = []
        for size in sorted(set(sizes)):
            chosen = torch.tensor([i for i, s in enumerate(sizes) if s == size], device=starts.device)
            groups.append(_group(starts[chosen], lengths[chosen], len(self.lengths)))
        return tuple(groups)


def _group(starts: torch.Tensor, lengths: torch.Tensor, tokens: int) -> Group:
    steps = torch.arange(int(lengths.max()), device=starts.device)
    is_real = steps < lengths[:, None]
    index = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return Group(index, is_real, is_whole=index.numel() == tokens and bool(is_real.all()))


@dataclass(slots=True)
class KeptAttention:
    """The result of one `packed_attention` call, for a layer that is recomputed in backward.

    An empty one is filled by the call; a filled one, passed with the same inputs, replaces the computation. out:
    (T, H, D); logsumexp: (H, T).
    """

    out: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None


def packed_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute the formula with a dense mask over the pack in plain PyTorch: the specification of `packed_attention`."""
    position = torch.arange(len(query), device=query.device)
    i, j = position[:, None], position[None]
    seen = (j <= i) & (j >= documents.starts[:, None])
    if window is not None:
        seen &= j > i - window
    if (prefixes := documents.prefixes) is not None:
        seen |= (j >= prefixes.roots[:, None]) & (j < prefixes.ends[:, None])
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    return softcap_attention(q, k, v, seen, scale=scale, softcap=softcap).transpose(0, 1)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kept: KeptAttention | None = None,
) -> torch.Tensor:
    """Return softmax(scale * q k^T) v within each document, causal, over the last `window` tokens.

    query: (T, H, D); key, value: (T, K, D); result: (T, H, D). `kept` stores the result for a second call with the
    same inputs. Dropout materializes the weights, (longest document)^2 per head, and keeps nothing.
    """
    rules = Rules(scale, window, softcap)
    if dropout:
        return _with_dropout(query, key, value, documents, rules, dropout)
    if not torch.is_grad_enabled():
        return _infer(query, key, value, documents, rules)
    output: torch.Tensor = _PackedAttention.apply(query, key, value, documents, rules, kept)
    return output


def _infer(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, rules: Rules
) -> torch.Tensor:
    """Return the attention without what backward needs: of a single document by cuDNN, if it can."""
    is_whole = rules.window is None or rules.window >= len(query)
    is_single = len(documents.bounds) == 2 and rules.softcap is None and is_whole
    if is_single and query.shape == key.shape and uses_cudnn_attention(query):
        return cudnn_forward(query, key, value, rules.scale)
    return _forward(query, key, value, documents, rules)[0]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: Documents,
        rules: Rules,
        kept: KeptAttention | None,
    ) -> torch.Tensor:
        if kept is not None and kept.out is not None and kept.logsumexp is not None:
            out, logsumexp = kept.out.detach(), kept.logsumexp  # the second pass of a recomputed layer
        else:
            out, logsumexp = _forward(query, key, value, documents, rules)
        if kept is not None and kept.out is None:
            kept.out, kept.logsumexp = out.detach(), logsumexp
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.documents, ctx.rules = documents, rules
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        found = _backward(grads[0], query, key, value, out, logsumexp, ctx.documents, ctx.rules)
        needed = [x if needs else None for x, needs in zip(found, ctx.needs_input_grad, strict=False)]
        return needed[0], needed[1], needed[2], None, None, None


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out, (T, H, D), and the logsumexp of the scores, (H, T)."""
    prefixes = documents.prefixes
    if rules.softcap is None and uses_flash_attention(query):
        out, logsumexp = flash_forward(query, key, value, documents.bounds, documents.longest, rules)
        if prefixes is not None:
            merge(out, logsumexp, *flash_prefix_forward(query, key, value, prefixes, rules.scale))
        return out, logsumexp
    if uses_triton(query):
        from fettle.ops.kernels.attention import attention_forward

        return attention_forward(query, key, value, documents.starts, prefixes, *rules[:3])
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    logsumexp = torch.empty(query.shape[1], len(query), dtype=wide, device=query.device)
    dtype = product_dtype(query)
    for group in documents.groups:
        forward = _fused_forward if _prefers_fused(query, group.index.shape[1], rules) else _tiled_forward
        # (documents, H or K, longest, D)
        q, k, v = (group.gather(x).to(dtype) for x in (query, key, value))
        group_out, group_logsumexp = forward(q, k, v, rules)
        group.scatter(group_out, out)
        group.scatter(group_logsumexp, logsumexp.T)
    for queries, keys in prefixes.spans() if prefixes is not None else ():
        rules = rules._replace(window=None, is_causal=False)
        forward = _fused_forward if _prefers_fused(query, keys.stop - keys.start, rules) else _tiled_forward
        q, k, v = (_one(x, part).to(dtype) for x, part in ((query, queries), (key, keys), (value, keys)))
        shared_out, shared_logsumexp = forward(q, k, v, rules)
        merge(out[queries], logsumexp[:, queries], shared_out[0].transpose(0, 1), shared_logsumexp[0])
    return out, logsumexp


def _one(x: torch.Tensor, part: slice) -> torch.Tensor:
    """Return a part of x (T, heads, D) as a batch of one, (1, heads, tokens, D)."""
    return x[part].transpose(0, 1)[None]


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    documents: Documents,
    rules: Rules,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    saved, prefixes = (query, key, value, out, logsumexp), documents.prefixes
    if rules.softcap is None and uses_flash_attention(query):
        own = flash_backward(grad, saved, documents.bounds, documents.longest, rules)
        if prefixes is None:
            return own
        shared = flash_prefix_backward(grad, saved, prefixes, rules.scale)
        return own[0].add_(shared[0]), own[1].add_(shared[1]), own[2].add_(shared[2])
    if uses_triton(query):
        from fettle.ops.kernels.attention import attention_backward

        return attention_backward(grad, *saved, documents.starts, prefixes, *rules[:3])
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    dtype = product_dtype(query)
    for group in documents.groups:
        backward = _fused_backward if _prefers_fused(query, group.index.shape[1], rules) else _tiled_backward
        q, k, v, group_out, group_grad = (group.gather(x).to(dtype) for x in (query, key, value, out, grad))
        if not group.is_whole:  # padding repeats a document's last token, whose gradient must count only once
            group_grad = group_grad.masked_fill(~group.is_real[:, None, :, None], 0)
        group_grads = backward(group_grad, q, k, v, group_out, group.gather(logsumexp.T), rules)
        for target, part in zip(grads, group_grads, strict=True):
            group.scatter(part, target)
    for queries, keys in prefixes.spans() if prefixes is not None else ():
        rules = rules._replace(window=None, is_causal=False)
        backward = (
            _fused_backward if _prefers_fused(query, keys.stop - keys.start, rules) else _tiled_backward
        )
        places = (queries, queries, keys, keys, queries)
        g, q, k, v, o = (
            _one(x, part).to(dtype) for x, part in zip((grad, query, key, value, out), places, strict=True)
        )
        added = backward(g, q, k, v, o, logsumexp[None, :, queries], rules)
        for target, place, more in zip(grads, (queries, keys, keys), added, strict=True):
            target[place] += more[0].transpose(0, 1)
    return grads[0], grads[1], grads[2]


def _prefers_fused(query: torch.Tensor, longest: int, rules: Rules) -> bool:
    is_plain = rules.softcap is None and (rules.window is None or longest <= rules.window)
    is_quicker = longest > TILED_TOKENS or product_dtype(query) == torch.float32
    return is_plain and query.device.type == "cpu" and is_quicker


def _repeat(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat key heads to one per query head: PyTorch's fused attention on a CPU does not support shared ones."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _fused_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _repeat(key, query), _repeat(value, query)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = fused(query, key, value, 0.0, rules.is_causal, scale=rules.scale)
    return out, logsumexp


def _fused_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    rules: Rules,
) -> tuple[torch.Tensor, ...]:
    repeated = (query, _repeat(key, query), _repeat(value, query))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = fused(grad, *repeated, out, logsumexp, 0.0, rules.is_causal, scale=rules.scale)
    if (shared := key.shape[1]) == query.shape[1]:
        return tuple(grads)
    # A shared key head gets the sum of its query heads' gradients: (B, H, N, D) -> (B, K, H / K, N, D) -> (B, K, N, D).
    return grads[0], *(x.unflatten(1, (shared, -1)).sum(2) for x in grads[1:])


def _tiled_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    # (B, H, N, D) -> (B * K, H / K, N, D): the query heads that share a key head side by side
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    out, logsumexp = tiled_forward(grouped, key.flatten(0, 1), value.flatten(0, 1), rules)
    return out.view(query.shape), logsumexp.view(query.shape[:3])


def _tiled_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    rules: Rules,
) -> tuple[torch.Tensor, ...]:
    shared = key.shape[1]
    # (B, H, N, ...) -> (B * K, H / K, N, ...), as in forward
    grad, grouped, out, logsumexp = (
        x.unflatten(1, (shared, -1)).flatten(0, 1) for x in (grad, query, out, logsumexp)
    )
    grads = tiled_backward(grad, grouped, key.flatten(0, 1), value.flatten(0, 1), out, logsumexp, rules)
    return tuple(x.view(like.shape) for x, like in zip(grads, (query, key, value), strict=True))


def _with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    rules: Rules,
    dropout: float,
) -> torch.Tensor:
    outputs = []
    for group in documents.groups:
        q, k, v = (group.gather(x) for x in (query, key, value))
        k, v = _repeat(k, q), _repeat(v, q)
        mask = _window_mask(q.shape[2], rules.window, q.device)
        out = softcap_attention(q, k, v, mask, scale=rules.scale, softcap=rules.softcap, dropout=dropout)
        outputs.append(out.transpose(1, 2)[group.is_real])
    # Results are in the order of the groups; `order` has the position of each in the pack.
    order = torch.cat([group.index[group.is_real] for group in documents.groups])
    return torch.cat(outputs)[torch.argsort(order)]


def _window_mask(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return (tokens, tokens), True where query i attends to key j: i - window < j <= i."""
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def softcap_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return attention with materialized scores, for cases that fused attention does not support.

    query, key, value: (batch, H, tokens, D). mask: bool (True = attend) or additive, broadcast to
    (batch, H, queries, keys); None: causal. Scores exist for QUERIES_AT_ONCE queries at a time, unless they are kept
    for backward.
    """
    size = torch.Size((query.shape[-2], key.shape[-2]))
    if mask is None:
        mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    masks = mask.expand(*mask.shape[:-2], *size).split(QUERIES_AT_ONCE, dim=-2)
    results = []
    for rows, visible in zip(query.split(QUERIES_AT_ONCE, dim=-2), masks, strict=True):
        scores = rows @ key.mT * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if visible.dtype == torch.bool:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        else:
            scores = scores + visible
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
        results.append((F.dropout(weights, dropout) if dropout else weights) @ value)
    return torch.cat(results, dim=-2)
