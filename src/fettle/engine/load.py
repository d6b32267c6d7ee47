"""Load what `--model` names: a checkpoint, an adapter together with its base, or a GGUF file."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.lora import attach
from fettle.adapters.model_ref import ModelRef, resolve
from fettle.adapters.vocabulary import fit_vocabulary
from fettle.checkpoints.dtypes import Dtype
from fettle.data.tokenizer import Tokenizer
from fettle.engine.base import Model
from fettle.errors import UserError, option
from fettle.models.device import device_of
from fettle.models.load import load_model


def load(
    name: str | Path, *, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[Model, Tokenizer]:
    """Load a model and its tokenizer.

    name: a checkpoint folder, an output folder of `fettle train` or any PEFT LoRA adapter, a hub name, or
    "fettle-tiny", the embedded model: a transformers model (an adapter: a PEFT model on its base) and tokenizer. A GGUF
    file gives objects of fettle's own, for `fettle.Engine`: it runs in llama.cpp and has no weights in PyTorch.
    device: None means CUDA if available. Raises UserError for faults that the user can fix.
    """
    return load_ref(resolve(name, need="run"), dtype=dtype, device=device)


def load_ref(
    ref: ModelRef, *, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[Model, Tokenizer]:
    """Like `load`, for a name that has been resolved."""
    if ref.kind == "gguf":
        return _open_gguf(ref.path, dtype, device)
    return load_weights(ref, dtype=dtype, device=device)


def load_weights(
    ref: ModelRef, *, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Like `load_ref`, for a model that has weights in PyTorch."""
    where = device_of(device)
    tokenizer = ref.tokenizer  # before the weights, as reading it checks all other files
    quantization = None if ref.facts is None else ref.facts.quantization
    model = load_model(ref.base, name=ref.base_name, dtype=dtype, device=where, quantization=quantization)
    if ref.kind == "checkpoint":
        return model, tokenizer
    fit_vocabulary(model, ref.stored.config.vocab_size, ref.shapes)
    return attach(model, ref.path).eval(), tokenizer


def _open_gguf(path: Path, dtype: Dtype, device: str | torch.device | None) -> tuple[Model, Tokenizer]:
    from fettle.engine.llama_cpp.gguf_file import GGUFFile, supports_gpu  # training needs no llama.cpp
    from fettle.engine.llama_cpp.tokenizer import LlamaCppTokenizer

    if dtype != "auto":
        raise UserError(
            f"{option('dtype')} is {dtype}, but a GGUF file runs in the types it is stored in: leave it out."
        )
    if device is not None and torch.device(device).type == "cuda" and not supports_gpu():
        raise UserError(
            f"{option('device')} is cuda, but the installed llama.cpp (xllamacpp) runs only on the CPU: use cpu."
        )
    file = GGUFFile(path)
    return file, LlamaCppTokenizer(file)
