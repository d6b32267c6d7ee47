"""Load what `--model` names: a checkpoint, an adapter together with its base, or a GGUF file."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.lora import attach
from fettle.adapters.model_ref import ModelRef, resolve
from fettle.adapters.vocabulary import fit_vocabulary
from fettle.checkpoints.dtypes import Dtype
from fettle.models.device import device_of
from fettle.models.load import load_model


def load(
    name: str | Path, *, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    name: a checkpoint folder, an output folder of `fettle train` or any PEFT LoRA adapter, a hub name, or
    "fettle-tiny", the embedded model; or a GGUF file, which runs in llama.cpp and has no weights in PyTorch.
    device: None means CUDA if available. Raises UserError for faults that the user can fix.
    """
    return load_ref(resolve(name, need="run"), dtype=dtype, device=device)


def load_ref(
    ref: ModelRef, *, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Like `load`, for a name that has been resolved."""
    if ref.kind == "gguf":
        from fettle.engine.llama_cpp.model import open_gguf  # training needs no llama.cpp

        return open_gguf(ref.path, dtype=dtype, device=device)
    where = device_of(device)
    tokenizer = ref.tokenizer  # before the weights, as reading it checks all other files
    quantization = None if ref.facts is None else ref.facts.quantization
    model = load_model(ref.base, name=ref.base_name, dtype=dtype, device=where, quantization=quantization)
    if ref.kind == "checkpoint":
        return model, tokenizer
    if ref.facts is not None:
        model.set_context(ref.facts.context_tokens)
    fit_vocabulary(model, ref.stored.config.vocab_size, ref.shapes)
    return attach(model, ref.path).eval(), tokenizer
