"""What a forward pass attends to: packed documents, a batch with masks, or a paged cache.

A forward pass chooses one context, and every layer's attention calls its `attend`. It takes the projections before the
rotation, as the paged cache rotates and stores a key in one pass.

Shapes: B batch, N tokens per row, H heads, K key-value heads, D channels per head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fettle.models.rope import DecoderRotaryEmbedding
from fettle.ops import Documents, apply_rotary, packed_attention, softcap_attention
from fettle.ops.attention import KeptAttention
from fettle.ops.paged_attention import prefill_attention, rotate_and_cache, rotate_and_decode, write_cache

if TYPE_CHECKING:
    from fettle.models.layer import DecoderAttention

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (B or 1, N, rotary_dim)."""


class AttentionContext(Protocol):
    def attend(
        self,
        layer: "DecoderAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: KeptAttention | None,
    ) -> torch.Tensor:
        """Rotate query and key and attend. query: (B, H, N, D); key, value: (B, K, N, D); result: (B * N, H * D) or
        (B, N, H, D). kept: the result for backward, if the layer is recomputed; only packed documents use it."""
        ...


@dataclass(frozen=True, slots=True)
class PackedDocuments:
    """Attention within each document of the concatenated rows."""

    rotation: Rotation
    documents: Documents

    @classmethod
    def of_rows(cls, rotary: DecoderRotaryEmbedding, x: torch.Tensor) -> "PackedDocuments":
        """Return the context in which each row of x (B, N, E) is one document."""
        is_start = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        is_start[:, 0] = True
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return cls(rotary(x, positions), Documents.from_starts(is_start.flatten()))

    def attend(
        self,
        layer: "DecoderAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: KeptAttention | None,
    ) -> torch.Tensor:
        query, key = apply_rotary(query, *self.rotation), apply_rotary(key, *self.rotation)
        query, key, value = (
            t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)
        )  # (B * N, H or K, D)
        return packed_attention(
            query,
            key,
            value.contiguous(),  # a slice of a fused projection would keep the whole of it for backward
            self.documents,
            scale=layer.scaling,
            window=layer.sliding_window,
            softcap=layer.softcap,
            dropout=layer.dropout,
            kept=kept,
        )


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Attention as transformers computes it: a mask per kind of layer, and its cache.

    masks: for layers without (False) and with (True) a sliding window; None if none is needed. options: further
    arguments of transformers' attention functions.
    """

    rotation: Rotation
    masks: dict[bool, torch.Tensor | None]
    cache: Cache | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def attend(
        self,
        layer: "DecoderAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: KeptAttention | None,
    ) -> torch.Tensor:
        query, key = apply_rotary(query, *self.rotation), apply_rotary(key, *self.rotation)
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer.layer_idx)
        attend: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            layer.config._attn_implementation, written_out_attention
        )
        # the sdpa interface refuses the argument, so it is passed only if it is set
        softcap = {} if layer.softcap is None else {"softcap": layer.softcap}
        out, _ = attend(
            layer,
            query,
            key,
            value,
            self.masks.get(layer.sliding_window is not None),
            dropout=layer.dropout,
            scaling=layer.scaling,
            sliding_window=layer.sliding_window,
            **softcap,
            **self.options,
        )
        return out


@dataclass(frozen=True, slots=True)
class PagedTokens:
    """New tokens of several sequences in one row (B = 1), whose keys and values are added to a paged cache.

    cache: keys and values of each layer; slots: where the tokens go; page_table and lengths: of the sequences, with the
    new tokens; all as in ops/paged_attention.py. bounds: where each sequence's new tokens begin; None if every sequence
    has one. documents: the same, if the new tokens are the sequences' first, which then need nothing from the cache.
    """

    rotation: Rotation
    cache: Sequence[tuple[torch.Tensor, torch.Tensor]]
    slots: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    bounds: torch.Tensor | None = None
    documents: Documents | None = None

    def attend(
        self,
        layer: "DecoderAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: KeptAttention | None,
    ) -> torch.Tensor:
        keys, values = self.cache[layer.layer_idx]
        rules: AttentionOptions = {
            "scale": layer.scaling,
            "window": layer.sliding_window,
            "softcap": layer.softcap,
        }
        if self.documents is not None:
            query, key = apply_rotary(query, *self.rotation), apply_rotary(key, *self.rotation)
            query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))  # (N, H or K, D)
            write_cache(key, value, keys, values, self.slots)
            return packed_attention(query, key, value, self.documents, **rules)
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        cos, sin = self.rotation[0][0], self.rotation[1][0]
        if self.bounds is None:
            new = (query, key, value, cos, sin)
            return rotate_and_decode(*new, keys, values, self.page_table, self.lengths, **rules)
        query = rotate_and_cache(query, key, value, cos, sin, keys, values, self.slots)
        return prefill_attention(query, keys, values, self.page_table, self.bounds, self.lengths, **rules)


class AttentionOptions(TypedDict):
    scale: float
    window: int | None
    softcap: float | None


def written_out_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The `eager` attention of transformers' interface. query: (B, H, N, D); result: (B, N, H, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if attention_mask is None and query.shape[2] == 1:  # a single new token attends to everything before it
        attention_mask = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    out = softcap_attention(
        query, key, value, attention_mask, scale=scaling, softcap=softcap, dropout=dropout
    )
    return out.transpose(1, 2), None
