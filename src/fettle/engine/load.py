"""Load what `--model` names: a checkpoint, an adapter together with its base, or a GGUF file."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.found import find
from fettle.adapters.lora import attach
from fettle.adapters.vocabulary import fit_vocabulary
from fettle.checkpoints.dtypes import Dtype
from fettle.checkpoints.locate import is_gguf
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
    if is_gguf(name):
        from fettle.engine.llama_cpp.model import open_gguf  # training needs no llama.cpp

        return open_gguf(Path(name).expanduser(), dtype=dtype, device=device)
    where = device_of(device)
    found = find(name)
    quantization = None if found.facts is None else found.facts.quantization
    model = load_model(found.base, name=found.base_name, dtype=dtype, device=where, quantization=quantization)
    if found.adapter is None:
        return model, found.tokenizer
    if found.facts is not None:
        model.set_context(found.facts.context_tokens)
    fit_vocabulary(model, found.stored.config.vocab_size, found.shapes)
    return attach(model, found.folder).eval(), found.tokenizer
