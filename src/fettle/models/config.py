"""A model's config by itself: its shapes can be known where its weights are not."""

import json
from pathlib import Path

from transformers import PreTrainedConfig

from fettle.errors import UserError, reason_of
from fettle.models.checkpoint import EMBEDDED, embedded_model
from fettle.models.families import Family, family_of


def config_of(name: str) -> tuple[PreTrainedConfig, Family]:
    """Return the config that `name` means, and its family: a folder, a config.json, fettle-tiny, or a hub name.

    Raises UserError where there is none, or of a family fettle does not know.
    """
    file = _config_file(name)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable config ({reason_of(error)}).") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{file}: no model_type in it; expected the config.json of a model.")
    family = family_of(content["model_type"], str(file))
    try:
        ignored = ("auto_map", "quantization_config")
        config = family.config.from_dict({k: v for k, v in content.items() if k not in ignored})
    except Exception as error:  # the library raises whatever its checks do
        raise UserError(f"{file}: not a valid {content['model_type']} config: {reason_of(error)}") from error
    return config, family


def _config_file(name: str) -> Path:
    path = embedded_model() if name == EMBEDDED else Path(name).expanduser()
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.exists() or name.count("/") != 1:
        raise UserError(f"{name}: no config.json there; give a model's folder or a hub name (owner/name).")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub's transport library, and so its errors, differ between versions
        raise UserError(
            f"{name} is neither a folder here nor to be had from the hub ({type(error).__name__}): "
            "give a folder that holds the model's config.json."
        ) from error
