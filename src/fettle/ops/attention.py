"""Causal attention over packed rows: every document sees only itself, without a mask.

A pack is several documents laid end to end. A dense mask over the whole pack costs tokens^2 memory and
computes mostly zeros. Here documents of similar length (equal up to the next power of two) are gathered
into one right-padded batch: under a causal rule the padding lies after every real query, so no mask is
needed and one fused call serves the whole group. Cost: the documents' own length^2, at most 4 times that.

Shapes: H heads, K key-value heads (H a multiple of K), D channels a head, T tokens in all rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SMALLEST_GROUP = 16
"""Documents shorter than this share one group: below it a call costs more than the padding."""


@dataclass(frozen=True, slots=True)
class Group:
    """Documents of similar length. index: (documents, longest) positions in the pack, the last token
    repeated as padding; is_real: the same shape, False on padding."""

    index: torch.Tensor
    is_real: torch.Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """How a flat row of T tokens divides into documents; made once per batch, used by every layer.

    lengths: (T,) each token's own document's length. restore: (T,) brings the groups' real tokens, laid
    end to end, back into the pack's order.
    """

    lengths: torch.Tensor
    groups: tuple[Group, ...]
    restore: torch.Tensor

    @classmethod
    def from_starts(cls, is_start: torch.Tensor) -> "Documents":
        """is_start: (T,) bool, True where a document begins; the first token always does."""
        starts = is_start.nonzero().flatten()
        ends = torch.cat((starts[1:], starts.new_tensor([is_start.numel()])))
        lengths = ends - starts
        sizes = [max(SMALLEST_GROUP, 1 << (int(n) - 1).bit_length()) for n in lengths.tolist()]
        groups = []
        for size in sorted(set(sizes)):
            chosen = torch.tensor([i for i, s in enumerate(sizes) if s == size], device=starts.device)
            groups.append(_group(starts[chosen], lengths[chosen]))
        order = torch.cat([group.index[group.is_real] for group in groups])
        return cls(torch.repeat_interleave(lengths, lengths), tuple(groups), torch.argsort(order))


def _group(starts: torch.Tensor, lengths: torch.Tensor) -> Group:
    steps = torch.arange(int(lengths.max()), device=starts.device)
    is_real = steps < lengths[:, None]
    index = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    return Group(index, is_real)


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
) -> torch.Tensor:
    """Return softmax(scale * q k^T) v within each document, causal, over the last `window` tokens.

    query: (T, H, D); key, value: (T, K, D); result: (T, H, D). With `softcap` the scores s become
    softcap * tanh(s / softcap) first (Gemma 2, arXiv 2408.00118, section 2).
    """
    outputs = []
    for group in documents.groups:
        q, k, v = (x[group.index].transpose(1, 2) for x in (query, key, value))
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
        mask = _window_mask(q.shape[2], window, q.device)
        if softcap is not None:
            out = softcap_attention(q, k, v, mask, scale=scale, softcap=softcap, dropout=dropout)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
            )
        outputs.append(out.transpose(1, 2)[group.is_real])
    return torch.cat(outputs)[documents.restore]


def _window_mask(tokens: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(tokens, tokens), True where query i may see key j: i - window < j <= i. None: plain causal."""
    if window is None or tokens <= window:
        return None
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


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
    """Attention written out, for what the fused call cannot do. All: (batch, H, tokens, D).

    mask: bool (True = may see) or additive, broadcast to (batch, H, queries, keys); None: causal.
    Needs queries * keys memory a head.
    """
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value if dropout else weights @ value
