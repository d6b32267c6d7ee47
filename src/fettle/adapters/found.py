"""Resolve a model's name to a checkpoint, or an adapter with its base, and check it without reading weights."""

from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from fettle.adapters.lora import TensorShapes, adapter_config_of, require_fit, shapes_in
from fettle.adapters.vocabulary import rows_with
from fettle.checkpoints.adapter_facts import AdapterFacts, facts_for
from fettle.checkpoints.folder import Checkpoint, inspect, is_adapter, read_adapter_config
from fettle.checkpoints.locate import locate
from fettle.errors import UserError
from fettle.models.config import StoredModel
from fettle.models.load import empty_model, load_tokenizer, stored_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a name refers to, checked as far as possible without reading weights.

    folder: of the checkpoint or the adapter; base: of the checkpoint. stored: with the adapter's vocabulary size.
    shapes: of the adapter's tensors.
    """

    folder: Path
    base: Path
    base_name: str
    checkpoint: Checkpoint
    stored: StoredModel
    tokenizer: PreTrainedTokenizerBase
    adapter: LoraConfig | None = None
    facts: AdapterFacts | None = None
    shapes: TensorShapes = field(default_factory=dict)


def find(name: str | Path) -> Found:
    """Return what `name` refers to: a checkpoint, or an adapter with its base. Raises UserError for every fault.

    config.json is checked against the weights first, as its faults would otherwise appear to be the tokenizer's.
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
    """Return the name to store in a run or an adapter: the absolute path if it exists, a hub name unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
