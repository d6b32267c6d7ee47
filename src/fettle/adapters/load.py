"""Whatever `--model` names, ready to use: a full checkpoint, an adapter on the base it finds by itself, a GGUF file."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.facts import AdapterFacts, facts_for
from fettle.adapters.lora import Shapes, adapter_config_of, attach, require_fit, shapes_in
from fettle.adapters.vocabulary import fit_vocabulary, rows_with
from fettle.errors import UserError
from fettle.llama_cpp.gguf_file import is_gguf
from fettle.llama_cpp.model import open_gguf
from fettle.models.checkpoint import Checkpoint, inspect, is_adapter, locate, read_adapter_config
from fettle.models.config import Dtype, StoredModel
from fettle.models.device import device_of
from fettle.models.load import empty_model, load_model, load_tokenizer, stored_model


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a name stands for, checked as far as it can be without reading weights.

    folder: the checkpoint's, or the adapter's; base: the checkpoint's. stored: with the vocabulary that the adapter
    gives it. shapes: of the adapter's tensors.
    """

    folder: Path
    base: Path
    base_name: str
    checkpoint: Checkpoint
    stored: StoredModel
    tokenizer: PreTrainedTokenizerBase
    adapter: LoraConfig | None = None
    facts: AdapterFacts | None = None
    shapes: Shapes = field(default_factory=dict)


def find(name: str | Path) -> Found:
    """Return what `name` stands for: a checkpoint, or an adapter with its base. Raises UserError for every fault.

    config.json is checked against the weights first: a fault of it would show up as one of the tokenizer.
    """
    folder = locate(str(name))
    if not is_adapter(folder):
        stored = stored_model(checkpoint := inspect(folder))
        return Found(
            folder=folder, base=folder, base_name=remembered_name(str(name)), checkpoint=checkpoint, stored=stored,
            tokenizer=load_tokenizer(folder, stored.config),
        )  # fmt: skip
    base_name, base = base_of(folder)
    facts = facts_for(folder, base)
    stored = stored_model(checkpoint := inspect(base))
    adapter, shapes = adapter_config_of(folder), shapes_in(folder)
    config = stored.config
    config.vocab_size = rows_with(config, adapter, shapes, folder)
    require_fit(empty_model(config), shapes, folder)
    has_tokenizer = (folder / "tokenizer.json").exists()
    return Found(
        folder=folder, base=base, base_name=base_name, checkpoint=checkpoint, stored=stored, adapter=adapter,
        facts=facts, shapes=shapes, tokenizer=load_tokenizer(folder if has_tokenizer else base, config),
    )  # fmt: skip


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
