"""Merge an adapter into its base, and prove the merged model still says what the adapter model says.

Merging rounds W + scale * B A to the weights' own dtype. In fp32 nothing is lost; in bf16 each weight moves
by up to 2^-9 of itself, of the same size as the rounding of every product the model computes. A difference
beyond that means that something other than rounding happened, and the merge is refused.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.errors import UserError
from fettle.evaluation.compare import peak_logit_difference

PROBES = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    'def add(a, b):\n    return a + b\n\n{"name": "Ana", "count": 3}',
    "Water boils at 100 degrees. Why? Because its vapour pressure then equals the air's.",
)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a logit, as a share of the largest logit. Measured on 2 to 8 layers: at most
1e-6 in fp32, 4e-3 in fp16, 3e-2 in bf16; a wrong scale or a missing layer gives 0.3 and more."""


def merge(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the base model with the adapter merged in, changed in place; the adapter is gone from it.

    Raises UserError where the merged model's logits differ from the adapter model's beyond rounding.
    """
    before = probe_logits(model, tokenizer)
    merged = model.merge_and_unload(safe_merge=True)
    require_equal(before, probe_logits(merged, tokenizer), merged.dtype)
    return merged


@torch.inference_mode()
def probe_logits(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> list[torch.Tensor]:
    """Logits (tokens, vocabulary) of each probe text."""
    was_training = model.training
    model.eval()
    logits = []
    for text in PROBES:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    model.train(was_training)
    return logits


def require_equal(before: list[torch.Tensor], after: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Return the largest difference (see TOLERANCE), or raise UserError where it is beyond rounding."""
    difference = max(peak_logit_difference(a, b) for a, b in zip(before, after, strict=True))
    if not difference <= TOLERANCE[dtype]:  # a NaN must not pass
        raise UserError(
            f"The merged model differs from the adapter model by {difference:.2%} of its largest logit, more than "
            f"rounding explains in {str(dtype).removeprefix('torch.')} ({TOLERANCE[dtype]:.2%}); nothing was "
            "written. Export the adapter as it is, or merge with --dtype float32."
        )
    return difference
