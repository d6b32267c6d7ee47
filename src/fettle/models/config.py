"""A model's config by itself: its shapes can be known where its weights are not."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from fettle.errors import UserError, reason_of
from fettle.models.checkpoint import (
    EMBEDDED,
    Checkpoint,
    embedded_model,
    is_adapter,
    is_nf4,
    read_adapter_config,
)
from fettle.models.families import FUSED_ACTIVATIONS, Family, family_of
from fettle.models.plain_config import plain_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Sizes that a config must state itself: in its stead a family's default would make another model."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")


class StoredModel(NamedTuple):
    """What a checkpoint stores. dtype: of what is not in NF4; is_nf4: whether the layers' matrices are."""

    config: "PreTrainedConfig"
    dtype: torch.dtype
    is_nf4: bool


def config_of(name: str, *, is_plain: bool = False) -> StoredModel:
    """Return what `name` stores, as far as its config says it: one that names no type is taken for the widest.

    name: a folder, a config.json, fettle-tiny, or a hub name; an adapter's folder stands for its base. is_plain: the
    config is one of models/plain_config.py, which is there at once.
    Raises UserError where there is none, or none that fettle can train.
    """
    file = _config_file(name)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable config ({reason_of(error)}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError(f"{file}: no model_type in it; expected the config.json of a model.")
    unseen = Checkpoint(
        folder=file.parent, config=content, weight_files=[], tensors={}, tensor_files={}, weight_bytes=0
    )
    dtype = DTYPES.get(str(content.get("dtype", content.get("torch_dtype"))), torch.float32)
    config = _plain(unseen) if is_plain else read_config(unseen)
    return StoredModel(config, dtype, is_nf4(unseen))


def _plain(checkpoint: Checkpoint) -> Any:
    return plain_config(_checked_family(checkpoint), checkpoint.config)


def read_config(checkpoint: Checkpoint) -> Any:
    """Return the family's config object for a checkpoint, without what only remote code would need.

    Its weights are not looked at. Raises UserError for a config that makes no model fettle can train.
    """
    where, family = f"{checkpoint.folder}/config.json", _checked_family(checkpoint)
    try:
        ignored = ("auto_map", "quantization_config")
        config = family.config.from_dict({k: v for k, v in checkpoint.config.items() if k not in ignored})
    except Exception as error:  # the library raises whatever its checks do
        raise UserError(
            f"{where}: not a valid {checkpoint.config['model_type']} config: {reason_of(error)}"
        ) from error
    config.architectures = [family.architecture]
    return config


def _checked_family(checkpoint: Checkpoint) -> Family:
    """Return the checkpoint's family. Raises UserError for another one, a foreign quantization and impossible sizes."""
    where = f"{checkpoint.folder}/config.json"
    family = family_of(checkpoint.config["model_type"], where)
    if checkpoint.quantization_config and not is_nf4(checkpoint):
        raise UserError(
            f"{where}: the checkpoint is already quantised, in another way than bitsandbytes' NF4; "
            "fettle needs the original one in bf16, fp16 or fp32."
        )
    _require_sizes(checkpoint.config, where)
    return family


def _require_sizes(content: dict[str, Any], where: str) -> None:
    """Raise UserError where a size is missing, or no whole number of 1 or more."""
    for name in (*REQUIRED, *OPTIONAL):
        value = content.get(name)
        if value is None and name in OPTIONAL:
            continue
        if name not in content:
            raise UserError(
                f"{where}: no {name} in it; expected the model's own config.json, with all sizes."
            )
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {name} is {value!r}; expected a whole number, 1 or more.")
    for name in ("hidden_act", "hidden_activation"):
        if content.get(name) is not None and not _is_activation(content[name]):
            raise UserError(f"{where}: {name} is {content[name]!r}, which transformers does not know.")


def _is_activation(name: Any) -> bool:
    if isinstance(name, str) and name in FUSED_ACTIVATIONS:
        return True
    from transformers.activations import ACT2FN  # which takes seconds to import

    return isinstance(name, str) and name in ACT2FN


def _config_file(name: str) -> Path:
    path = embedded_model() if name == EMBEDDED else Path(name).expanduser()
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if is_adapter(path):
        return _config_file_of_base(path)
    if (path / "run.yaml").is_file():
        raise UserError(
            f"{path} holds a run that was stopped before its end, not a model yet: finish it with "
            f"fettle {_command_of(path)} --resume --output {path}."
        )
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


def _config_file_of_base(adapter: Path) -> Path:
    base: str = read_adapter_config(adapter)["base_model_name_or_path"]
    try:
        if is_adapter(Path(base).expanduser()):
            raise UserError(f"{base} is an adapter itself.")
        return _config_file(base)
    except UserError as error:
        raise UserError(
            f"{adapter} is an adapter for '{base}', whose config cannot be read: {error} If the model has "
            f"moved, correct base_model_name_or_path in {adapter / 'adapter_config.json'}."
        ) from error


def _command_of(run: Path) -> str:
    """The command that made a run's folder: its run.yaml begins with it."""
    first_line = (run / "run.yaml").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return "pretrain" if "fettle pretrain" in first_line else "train"
