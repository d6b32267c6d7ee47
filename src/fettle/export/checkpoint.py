"""Export a model, its adapter merged in, as a Hugging Face folder for transformers, vLLM and the like."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fettle.adapters.load import base_of
from fettle.export.merge import load_merged, write_down_context
from fettle.files import require_free_space, require_new_folder, write_aside
from fettle.generation.decode import stop_ids
from fettle.models.checkpoint import Checkpoint, inspect, is_adapter, locate
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.load import Dtype, empty_model, read_config, stored_dtype
from fettle.models.quantized import save_nf4
from fettle.models.save import save_model
from fettle.quantization.layers import plain_linears, quantize_linears

NF4_BYTES = 0.52
"""A weight's on disk, its share of the scales included."""

TOKENIZER_BYTES = 20 * 10**6
"""At most, of everything but the weights."""


def export_safetensors(name: str | Path, to: Path, *, dtype: Dtype = "auto") -> Path:
    """Write the full model that `name` stands for into the new folder `to` and return it.

    An adapter is merged into its base first and the merge checks itself. One trained beyond LongRoPE's original
    context leaves a model that has the long factors at every length. The folder is complete (weights,
    config, generation config, tokenizer, chat template) or not there.
    """
    full, tokenizer = merged_model(name, to := Path(to), dtype)
    with write_aside(to) as aside:
        save_model(full, tokenizer, aside)
    return to


def export_nf4(name: str | Path, to: Path, *, dtype: Dtype = "auto") -> Path:
    """The same with the layers' matrices in NF4, as transformers and vLLM open it where bitsandbytes is installed."""
    full, tokenizer = merged_model(name, to := Path(to), dtype, matrix_bytes=NF4_BYTES)
    quantize_linears(full)
    with write_aside(to) as aside:
        save_nf4(full, tokenizer, aside)
    return to


def merged_model(
    name: str | Path, to: Path, dtype: Dtype, *, matrix_bytes: float | None = None
) -> tuple[DecoderForCausalLM, PreTrainedTokenizerBase]:
    """The full model in memory, once everything that could stand against writing it to `to` has been looked at.

    matrix_bytes: what a weight of the layers' matrices will take on disk, where that is not its dtype's size.
    """
    require_new_folder(to, "the exported model")
    folder = locate(str(name))
    checkpoint = inspect(base_of(folder)[1] if is_adapter(folder) else folder)
    needed = _bytes(checkpoint, dtype, matrix_bytes) + TOKENIZER_BYTES
    require_free_space(to, int(needed), "the exported model")
    full, tokenizer = load_merged(name, dtype=dtype)
    write_down_context(full.config, full.model.rotary_emb.context_tokens)
    generation = full.generation_config  # others stop at what it names, and at nothing else
    generation.eos_token_id = stop_ids(generation.eos_token_id, tokenizer) or None
    return full, tokenizer


def _bytes(checkpoint: Checkpoint, dtype: Dtype, matrix_bytes: float | None) -> float:
    """What the weights will take on disk."""
    config = read_config(checkpoint)
    model = empty_model(config)
    size = (stored_dtype(checkpoint) if dtype == "auto" else getattr(torch, dtype)).itemsize
    weights = sum(each.numel() for each in model.parameters())
    inside = sum(linear.weight.numel() for linear in plain_linears(model).values())
    return weights * size + inside * ((matrix_bytes or size) - size)
