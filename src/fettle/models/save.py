"""Save a checkpoint folder that stock transformers loads without fettle."""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fettle.models.progress_bars import without_progress_bars

PORTABLE_CLASS = "PreTrainedTokenizerFast"
LOADING_NOTES = ("backend", "is_local", "local_files_only")
"""Entries of transformers 5 about where a tokenizer was loaded from; they say nothing about the tokenizer."""


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into `folder`, which is created if necessary.

    Names and shapes are the official ones, the dtype is the model's.
    """
    with without_progress_bars():
        model.save_pretrained(str(folder))
    _add_old_spellings(folder / "config.json")
    save_tokenizer(tokenizer, folder)


def save_around_weights(
    config: PreTrainedConfig, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write everything that `save_model` writes except the weights, for a model that is not in memory."""
    config.save_pretrained(str(folder))
    generation.save_pretrained(str(folder))
    _add_old_spellings(folder / "config.json")
    save_tokenizer(tokenizer, folder)


def _add_old_spellings(file: Path) -> None:
    """Add dtype and rope options in the spelling of releases before transformers 5, which vLLM used as well."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    if "rope_theta" in (rope := config.get("rope_parameters") or {}):
        config |= _old_rope(rope)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _old_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of config.json that `rope` had before transformers 5."""
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
    # Exactly three entries, as old readers require. Newer readers prefer it to rope_parameters, so if anything
    # would be lost, it is left out.
    return outside | ({"rope_scaling": scaling} if len(scaling) == 3 else {})


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer so that the folder tokenizes the same in every library version.

    tokenizer_config.json may name a class (LlamaTokenizer) that overrides rules of tokenizer.json, depending on the
    config.json next to it. With the generic class, tokenizer.json, which describes the whole tokenizer, is the only
    source.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = PORTABLE_CLASS
    for note in LOADING_NOTES:
        config.pop(note, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
