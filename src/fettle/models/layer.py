"""One layer of the decoder, for every family: norm, attention, MLP (mlp.py), layer.

It imports nothing of transformers, which takes seconds: a plan builds one layer to count its weights
(planning/shapes.py). What a pass attends to comes with its `AttentionContext`.

Shapes: B batch, N tokens per row, H heads, K key-value heads, D channels per head, E hidden size.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from fettle.models.families import Family, head_dim_of, option, sliding_window_of
from fettle.models.mlp import DecoderMLP
from fettle.models.projections import infer, project
from fettle.ops import rms_norm
from fettle.ops.attention import KeptAttention
from fettle.recompute.policies import Keeping, Policy, run_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fettle.models.attention_context import AttentionContext


class DecoderRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset)


class DecoderAttention(nn.Module):
    def __init__(self, config: "PreTrainedConfig", family: Family, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads: int = config.num_attention_heads
        self.key_value_heads: int = config.num_key_value_heads
        self.head_dim = head_dim_of(config)
        self.num_key_value_groups = self.heads // self.key_value_heads  # read by transformers' sdpa interface
        self.is_causal = True
        self.scaling: float = option(config, "query_pre_attn_scalar", self.head_dim) ** -0.5
        self.softcap: float | None = option(config, "attn_logit_softcapping")
        self.sliding_window = sliding_window_of(config, layer_idx)
        self.is_fused = family.has_fused_projections

        query_size, key_size = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        bias = bool(option(config, "attention_bias", False))
        qkv_bias = bias or family.has_qkv_bias
        if self.is_fused:
            self.qkv_proj = nn.Linear(config.hidden_size, query_size + 2 * key_size, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=qkv_bias)
            self.k_proj = nn.Linear(config.hidden_size, key_size, bias=qkv_bias)
            self.v_proj = nn.Linear(config.hidden_size, key_size, bias=qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        if family.has_qk_norm:
            self.q_norm = DecoderRMSNorm(self.head_dim, config.rms_norm_eps, family.has_norm_offset)
            self.k_norm = DecoderRMSNorm(self.head_dim, config.rms_norm_eps, family.has_norm_offset)
        self.has_qk_norm = family.has_qk_norm

    def project(
        self, x: torch.Tensor, norm: DecoderRMSNorm | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: (B, N, E) -> query (B, H, N, D), key and value (B, K, N, D), before the rotation.

        norm: to apply to x first, without gradients.
        """
        multiply = project if norm is None else partial(infer, norm=norm)
        if self.is_fused:
            query_size, key_size = self.heads * self.head_dim, self.key_value_heads * self.head_dim
            query, key, value = multiply(x, self.qkv_proj)[0].split((query_size, key_size, key_size), dim=-1)
        else:
            query, key, value = multiply(x, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (t.view(*t.shape[:-1], -1, self.head_dim) for t in (query, key, value))
        if self.has_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @property
    def dropout(self) -> float:
        """The share of attention weights to drop in this pass."""
        return self.config.attention_dropout if self.training else 0.0

    def forward(
        self, x: torch.Tensor, context: "AttentionContext", kept: KeptAttention | None = None
    ) -> torch.Tensor:
        """x: (B, N, E) -> (B, N, E). context: what the pass attends to. kept: see `recompute/policies.py`."""
        attended = context.attend(self, *self.project(x), kept)
        return project(attended.reshape(*x.shape[:-1], -1), self.o_proj)[0]


class DecoderLayer(nn.Module):
    """One layer. policy: what of its forward pass is kept for backward; set by the memory plan."""

    def __init__(self, config: "PreTrainedConfig", family: Family, layer_idx: int) -> None:
        super().__init__()
        self.policy = Policy.KEEP
        self.self_attn = DecoderAttention(config, family, layer_idx)
        self.mlp = DecoderMLP(config, family)
        self.has_sandwich_norms = family.has_sandwich_norms
        norm = partial(DecoderRMSNorm, config.hidden_size, config.rms_norm_eps, family.has_norm_offset)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        if self.has_sandwich_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.residual_dropout = nn.Dropout(option(config, "resid_pdrop", 0.0))

    def forward(self, x: torch.Tensor, context: "AttentionContext") -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            return run_layer(self.policy, partial(self.compute, context=context), x)
        if not self.training and not torch.is_grad_enabled() and not self.has_sandwich_norms:
            return self.infer(x, context)
        return self.compute(x, Keeping(), context)

    def compute(self, x: torch.Tensor, keeping: Keeping, context: "AttentionContext") -> torch.Tensor:
        """x: (B, N, E) -> (B, N, E). keeping: what the layer's parts may keep for backward."""
        mlp = partial(
            self.mlp, keep=keeping.mlp, skip_output=keeping.is_recomputing and not self.has_sandwich_norms
        )
        attended = self.self_attn(
            keeping.recomputed(self.input_layernorm, x), context, kept=keeping.attention
        )
        if self.has_sandwich_norms:
            x = x + self.residual_dropout(self.post_attention_layernorm(attended))
            return x + self.residual_dropout(
                self.post_feedforward_layernorm(mlp(keeping.recomputed(self.pre_feedforward_layernorm, x)))
            )
        x = x + self.residual_dropout(attended)
        return x + self.residual_dropout(mlp(keeping.recomputed(self.post_attention_layernorm, x)))

    def infer(self, x: torch.Tensor, context: "AttentionContext") -> torch.Tensor:
        """`compute` without gradients: norms and sums go with the products, which for one token fuse them."""
        attention = self.self_attn
        attended = context.attend(attention, *attention.project(x, norm=self.input_layernorm), None)
        (x,) = infer(attended.reshape(*x.shape[:-1], -1), attention.o_proj, residual=x)
        return self.mlp.infer(x, norm=self.post_attention_layernorm)
