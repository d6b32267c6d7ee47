"""Back to a checkpoint folder that stock transformers, and its tokenizer, open by themselves."""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fettle.models.progress_bars import without_progress_bars

PORTABLE_CLASS = "PreTrainedTokenizerFast"
LOADING_NOTES = ("backend", "is_local", "local_files_only")
"""What transformers 5 notes of where a tokenizer was loaded from; nothing of the tokenizer itself."""


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into `folder`, made if need be.

    The names and shapes are the official ones, the dtype is the model's.
    """
    with without_progress_bars():
        model.save_pretrained(str(folder))
    _add_old_spellings(folder / "config.json")
    save_tokenizer(tokenizer, folder)


def save_around_weights(
    config: PreTrainedConfig, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write what `save_model` writes, but the weights, for a model that is not in memory."""
    config.save_pretrained(str(folder))
    generation.save_pretrained(str(folder))
    _add_old_spellings(folder / "config.json")
    save_tokenizer(tokenizer, folder)


def _add_old_spellings(file: Path) -> None:
    """Say dtype and rope as releases before transformers 5 read them, and vLLM's of that time, beside the new way."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    if "rope_theta" in (rope := config.get("rope_parameters") or {}):
        config |= _old_rope(rope)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Where `rope` stood in config.json before transformers 5."""
    kind = rope.get("rope_type", "default")
    names = "rope_theta", "partial_rotary_factor"
    outside: dict[str, Any] = {name: rope[name] for name in names if name in rope}
    if kind == "default":
        return outside | {"rope_scaling": None}
    scaling = {name: value for name, value in rope.items() if name not in outside} | {"type": kind}
    if kind != "longrope":
        return outside | {"rope_scaling": scaling}
    original = scaling.pop("original_max_position_embeddings", None)
    outside |= {} if original is None else {"original_max_position_embeddings": original}
    del scaling["rope_type"]
    # three entries and no more; newer readers heed it before rope_parameters, so nothing may be lost by it
    return outside | ({"rope_scaling": scaling} if len(scaling) == 3 else {})


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer so that the folder tokenises alone, the same in every library version.

    tokenizer_config.json may name a class (LlamaTokenizer) that rebuilds its own rules over those of
    tokenizer.json, depending on the config.json beside it. Naming the neutral class makes tokenizer.json,
    which holds the whole tokenizer, the only authority.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = PORTABLE_CLASS
    for note in LOADING_NOTES:
        config.pop(note, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
