"""Merge an adapter into its base, and verify that the merged model matches the adapter model.

Merging rounds W + scale * B A to the dtype of the weights. A larger difference means that the merge failed, and it is
refused. Two checks are made, as neither is sufficient alone:

- Rows of every merged weight are compared element by element with W + scale * B A, computed here in fp32. This detects
  a missing layer or a wrong scale even if the adapter is small.
- The logits of both models are compared on a few texts. This detects faults outside those weights. It is less
  sensitive: in bf16, rounding in a deep model changes logits more than a missing layer does.

The bound on weights follows from the dtype: rounding to nearest changes an element by at most half of eps times its
magnitude. The bound on logits limits the root mean square of the difference relative to that of the expected logits.
It is based on measurements: random models of phi3, gemma2 and qwen3, 2 to 32 layers, hidden size 64, and random
adapters of rank 16 on every linear layer with updates of 2 to 50% of the weights.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.lora import LoraLinear
from fettle.adapters.model_ref import ModelRef
from fettle.checkpoints.dtypes import Dtype
from fettle.engine.load import load_weights
from fettle.errors import UserError, option, reason_of
from fettle.models.modes import evaluating
from fettle.quantization.layers import dequantize_linears

PROBES = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    'def add(a, b):\n    return a + b\n\n{"name": "Ana", "count": 3}',
    "Water boils at 100 degrees. Why? Because its vapour pressure then equals the air's.",
)
ROWS = 16
"""Rows compared per weight, evenly spaced."""

SMALLEST = 1e-6
"""Absolute tolerance: the fp32 sums of B A, and fp16 near zero, are not more exact."""

LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
"""Measured with 8 layers: 2e-6 in fp32, 5e-3 in fp16, 4e-2 in bf16; with 32: 3e-6, 7e-3, 5e-2. A missing matrix in the
middle of 2 to 8 layers gives as little as 6e-3 if the update is 2% of the weights, 3e-2 if it is 10%."""


def load_merged(
    ref: ModelRef, *, dtype: Dtype = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, with its adapter merged, as one dense model, and its tokenizer."""
    model, tokenizer = load_weights(ref, dtype=dtype, device=device)
    dequantize_linears(model)  # an adapter trained on quantized weights is merged onto the dequantized ones
    if dtype == "float32":
        model.float()  # dequantization gives the dtype that was quantized
    return merge(model, tokenizer) if isinstance(model, PeftModel) else model, tokenizer


def merge(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the base model with the adapter merged; it is changed in place, and the adapter is removed.

    Raises UserError if the merged model differs from the adapter model beyond rounding, or if PEFT cannot merge it.
    """
    logits, rows = probe_logits(model, tokenizer), expected_rows(model)
    try:
        merged = model.merge_and_unload()  # not PEFT's safe_merge, which rounds twice
    except (RuntimeError, ValueError, NotImplementedError) as error:  # kinds of LoRA that PEFT cannot merge
        raise UserError(
            f"The adapter cannot be merged ({reason_of(error)}): use it unmerged, with its base model."
        ) from error
    require_rows(merged, rows)
    require_logits(probe_logits(merged, tokenizer), logits, merged.dtype)
    return merged


@torch.no_grad()
def expected_rows(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return ROWS rows of each merged weight's expected value, fp32 (rows, in_features), by module name.

    Raises UserError for an adapter with NaN or Inf.
    """
    expected = {}
    for name, layer in model.get_base_model().named_modules():
        if (
            not isinstance(layer, LoraLinear) or layer.lora_variant
        ):  # variants (DoRA) are checked by logits only
            continue
        rows = _merged_rows(layer)
        if not rows.isfinite().all():
            raise UserError(
                f"The adapter's weights for '{name}' contain NaN or Inf: its training diverged; "
                f"train again with a lower {option('learning_rate')}."
            )
        expected[name] = rows
    return expected


def _merged_rows(layer: LoraLinear) -> torch.Tensor:
    """Return W + scale * B A for the compared rows."""
    weight = layer.get_base_layer().weight
    at = _spread(weight)
    rows: torch.Tensor = weight[at].float()
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight[at].float()
            rows = rows + layer.scaling[name] * (b @ a)
    return rows


def _spread(weight: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0]), device=weight.device).long()


@torch.no_grad()
def require_rows(merged: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    """Raise UserError if a merged weight is not as expected: |found - exact| <= eps |exact| + SMALLEST."""
    for name, exact in expected.items():
        weight = merged.get_submodule(name).weight
        limit = torch.finfo(weight.dtype).eps * exact.abs() + SMALLEST
        is_right = (weight[_spread(weight)].float() - exact).abs() <= limit  # False for a NaN
        if not is_right.all():
            wrong = int((~is_right).sum())
            what = f"the weights of '{name}' ({wrong:,} of {is_right.numel():,} compared)"
            raise _refusal(what, weight.dtype)


@torch.inference_mode()
def probe_logits(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> list[torch.Tensor]:
    """Return the logits (tokens, vocabulary) of each probe text."""
    logits = []
    with evaluating(model):
        for text in PROBES:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
            logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return logits


def require_logits(after: list[torch.Tensor], before: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Raise UserError if the logits of a text differ beyond rounding (see LOGIT_TOLERANCE)."""
    difference = max(relative_difference(a, b) for a, b in zip(after, before, strict=True))
    if not difference <= LOGIT_TOLERANCE[dtype]:
        what = f"its logits (by {difference:.2%}; {LOGIT_TOLERANCE[dtype]:.2%} is allowed)"
        raise _refusal(what, dtype)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to that of `expected`."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm().clamp(min=1e-12))


def write_down_context(config: PreTrainedConfig, context_tokens: int | None) -> None:
    """If LongRoPE is fixed at its long factors, store only those in the config, as stock models choose by length."""
    rope = config.rope_parameters
    is_longrope = rope["rope_type"] == "longrope" and context_tokens is not None
    if is_longrope and context_tokens > rope["original_max_position_embeddings"]:
        rope["short_factor"] = list(rope["long_factor"])


def _refusal(what: str, dtype: torch.dtype) -> UserError:
    advice = "" if dtype == torch.float32 else f", or merge with {option('dtype')} float32"
    return UserError(
        f"The merged model differs from the adapter model in {what} by more than rounding to "
        f"{str(dtype).removeprefix('torch.')} explains; nothing was written. Use the adapter unmerged{advice}."
    )
