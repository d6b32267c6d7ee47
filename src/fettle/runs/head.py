"""The output head in training: label log-probabilities for TRL's trainers, computed by fettle's op.

TRL patches the model instance with its own forward pass, which handles `fused_lm_head=True` without materializing
the logits. On a CPU it scores every token, in one tile, with three passes of matrix products. `use_own_head` replaces
it by `fettle.ops.token_log_probs`: labelled tokens only, in chunks, with two passes.
"""

import functools
from types import MethodType
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from fettle.models.decoder import DecoderForCausalLM
from fettle.models.families import option
from fettle.ops.token_log_probs import token_log_probs


def use_own_head(model: DecoderForCausalLM) -> None:
    """Replace the forward pass that TRL patched in; `generate` still sees the class's signature."""

    @functools.wraps(type(model).forward)
    def forward(self: DecoderForCausalLM, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return type(model).forward(self, *args, **kwargs)
        return score_labels(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def score_labels(
    model: DecoderForCausalLM,
    *args: Any,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """Return TRL's output: the log-probability of each next-token label, 0 for labels of -100.

    labels: (B, N), each predicted from the previous position; shift_labels: (B, N), from the same position.
    """
    hidden = model.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
    if shift_labels is None:
        assert labels is not None
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    mask = shift_labels != -100
    scores = token_log_probs(
        hidden[mask],
        model.lm_head.weight,
        shift_labels[mask],
        option(model.config, "final_logit_softcapping"),
    )
    log_probs, entropy, is_top1 = (
        each.new_zeros(mask.shape).masked_scatter(mask, each)
        for each in (scores.log_probs, scores.entropy, scores.is_top1)
    )
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
    )
