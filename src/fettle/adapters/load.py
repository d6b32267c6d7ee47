"""Whatever `--model` names, ready to use: a full checkpoint, an adapter on the base it finds by itself, a GGUF file."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.facts import facts_for
from fettle.adapters.lora import attach
from fettle.errors import UserError
from fettle.llama_cpp.gguf_file import is_gguf
from fettle.llama_cpp.model import open_gguf
from fettle.models.checkpoint import inspect, is_adapter, locate, read_adapter_config
from fettle.models.config import Dtype
from fettle.models.device import device_of
from fettle.models.load import load_model, load_tokenizer


def load(
    name: str | Path, *, dtype: Dtype = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    name: a checkpoint folder, an output folder of `fettle train` or any PEFT LoRA adapter, a hub name, or
    "fettle-tiny", the embedded model; or a GGUF file, which is run in llama.cpp and has no weights in PyTorch.
    device: None takes a CUDA device where there is one. Raises UserError for whatever the user can mend.
    """
    if is_gguf(name):
        return open_gguf(Path(name).expanduser(), dtype=dtype, device=device)
    folder = locate(str(name))
    where = device_of(device)
    if not is_adapter(folder):
        inspect(folder)
        tokenizer = load_tokenizer(folder)  # first: a folder without one is found before a long load
        return load_model(folder, name=remembered_name(str(name)), dtype=dtype, device=where), tokenizer
    base_name, base_folder = base_of(folder)
    facts = facts_for(folder, base_folder)
    quantization = None if facts is None else facts.quantization
    base = load_model(base_folder, name=base_name, dtype=dtype, device=where, quantization=quantization)
    if facts is not None:
        base.set_context(facts.context_tokens)
    has_tokenizer = (folder / "tokenizer.json").exists()
    return attach(base, folder).eval(), load_tokenizer(folder if has_tokenizer else base_folder)


def base_of(adapter_folder: Path) -> tuple[str, Path]:
    """Return the name and the folder of the model an adapter belongs to."""
    name: str = read_adapter_config(adapter_folder)["base_model_name_or_path"]
    try:
        return name, locate(name)
    except UserError as error:
        raise UserError(
            f"{adapter_folder} is an adapter for '{name}', which cannot be opened: {error} If the model has "
            f"moved, correct base_model_name_or_path in {adapter_folder / 'adapter_config.json'}."
        ) from error


def remembered_name(name: str) -> str:
    """How a run or an adapter is to name what lies on disk: by its absolute path; a hub name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
