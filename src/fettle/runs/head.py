"""The output head in training: label log-probabilities for TRL's trainers, computed by fettle's ops.

TRL patches the model instance with its own forward pass, which handles `fused_lm_head=True` without materializing
the logits. On a CPU it scores every token, in one tile, with three passes of matrix products. `use_own_head` replaces
it by `fettle.ops.token_log_probs`: labelled tokens only, in chunks, with two passes.

A padded batch, as TRL's preference trainers make it, runs as one packed row without padding, in which rows with the
same prompt share its tokens (models/packing.py); the result is that of the padded batch.

Shapes: B rows, N tokens per row.
"""

import functools
from types import MethodType
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput

from fettle.models.decoder import DecoderForCausalLM
from fettle.models.families import option, sliding_window_of
from fettle.models.packing import pack_batch
from fettle.ops.token_log_probs import token_log_probs


def use_own_head(model: DecoderForCausalLM, *, temperature: float = 1.0) -> None:
    """Replace the forward pass that TRL patched in; `generate` still sees the class's signature.

    temperature: what the logits are divided by, as TRL's `add_fused_lm_head` takes it.
    """

    @functools.wraps(type(model).forward)
    def forward(self: DecoderForCausalLM, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return type(model).forward(self, *args, **kwargs)
        return score_labels(self, *args, temperature=temperature, **kwargs)

    model.forward = MethodType(forward, model)


def score_labels(
    model: DecoderForCausalLM,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    temperature: float = 1.0,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """Return TRL's output: the log-probability of each next-token label, 0 for labels of -100.

    labels: (B, N), each predicted from the previous position; shift_labels: (B, N), from the same position.
    """
    kwargs |= {"use_cache": False}
    places = None
    if (
        attention_mask is not None
        and input_ids is not None
        and labels is not None
        and _can_pack(model, kwargs)
    ):
        packed = pack_batch(input_ids, attention_mask, labels, share=_can_share(model, attention_mask))
        input_ids, attention_mask, places = packed.input_ids, None, packed.places
        kwargs |= {"position_ids": packed.position_ids, "shares_prefixes": True}
    hidden = model.base_model(input_ids, attention_mask, **kwargs).last_hidden_state
    if places is not None:
        hidden, places = hidden[0], places[:, :-1]
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden if places is not None else hidden[:, :-1], labels[:, 1:]
    mask = shift_labels != -100
    scores = token_log_probs(
        hidden[mask] if places is None else hidden[places[mask]],
        model.lm_head.weight,
        shift_labels[mask],
        option(model.config, "final_logit_softcapping"),
        temperature,
    )
    per_token = {
        name: each.new_zeros(mask.shape).masked_scatter(mask, each)
        for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
        for each in (getattr(scores, name),)
    }
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(loss=-per_token["log_probs"].sum() / count, label_mask=mask, **per_token)


def _can_pack(model: DecoderForCausalLM, kwargs: dict[str, Any]) -> bool:
    """Whether a padded batch may run as a packed row: not if the caller gives positions, or chose an attention."""
    return model.model.has_own_attention and not any(
        kwargs.get(name) is not None for name in ("position_ids", "inputs_embeds", "past_key_values")
    )


def _can_share(model: DecoderForCausalLM, attention_mask: torch.Tensor) -> bool:
    """Whether sharing a prompt's tokens gives the same result as a copy of them per row.

    Not with dropout, which draws for every copy; nor if a row exceeds a sliding window; nor if LongRoPE's factors
    depend on the length of each row.
    """
    longest = int(attention_mask.sum(-1).max())
    config, rotary = model.config, model.model.rotary_emb
    windows = [sliding_window_of(config, index) for index in range(len(model.model.layers))]
    has_dropout = model.training and (
        config.attention_dropout > 0 or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    )
    fits = all(window is None or longest <= window for window in windows)
    return fits and not has_dropout and rotary.factors_for(longest) == rotary.factors_for(1)
