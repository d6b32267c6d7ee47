"""Export a model, its adapter merged in, as a Hugging Face folder for transformers, vLLM and the like."""

import math
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from fettle.adapters.load import base_of, load
from fettle.export.merge import merge
from fettle.files import require_free_space, require_new_folder, write_aside
from fettle.models.checkpoint import inspect, is_adapter, locate
from fettle.models.load import Dtype
from fettle.models.save import save_model
from fettle.quantization.layers import dequantize_linears

_BYTES_A_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}


def export_safetensors(name: str | Path, to: Path, *, dtype: Dtype = "auto") -> Path:
    """Write the full model that `name` stands for into the new folder `to` and return it.

    An adapter is merged into its base first and the merge checks itself. One trained beyond LongRoPE's original
    context leaves a model that has the long factors at every length. The folder is complete (weights,
    config, generation config, tokenizer, chat template) or not there.
    """
    to = Path(to)
    require_new_folder(to, "the exported model")
    folder = locate(str(name))
    stored = inspect(base_of(folder)[1] if is_adapter(folder) else folder)
    needed = stored.weight_bytes
    if dtype != "auto":
        weights = sum(math.prod(header.shape) for header in stored.tensors.values())
        needed = weights * _BYTES_A_WEIGHT[dtype]
    require_free_space(to, needed + 20 * 10**6, "the exported model")
    model, tokenizer = load(name, dtype=dtype)
    dequantize_linears(model)  # an adapter trained on quantised weights is merged onto those, as they are
    full = merge(model, tokenizer) if isinstance(model, PeftModel) else model
    _write_down_context(full)
    with write_aside(to) as aside:
        save_model(full, tokenizer, aside)
    return to


def _write_down_context(model: PreTrainedModel) -> None:
    """Where LongRoPE is fixed at its long factors, let the config give no others: stock models choose by length."""
    rope, context = model.config.rope_parameters, model.model.rotary_emb.context_tokens
    is_longrope = rope["rope_type"] == "longrope" and context is not None
    if is_longrope and context > rope["original_max_position_embeddings"]:
        rope["short_factor"] = list(rope["long_factor"])
