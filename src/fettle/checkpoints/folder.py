"""Inspect a checkpoint folder without loading weights.

A checkpoint is a folder with `config.json`, a tokenizer and safetensors weights, in one file or in shards listed by an
index. Only their headers are read here. Pickled weights (`*.bin`, `*.pt`) can run any code when opened: they are
refused, never loaded. Code shipped with a checkpoint (`auto_map`) is never run either.

Nothing here imports torch, so a command line reports a faulty checkpoint at once.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fettle.checkpoints.safetensors_header import TensorHeader, read_places, require_content
from fettle.errors import UserError
from fettle.files import shell_path

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LONGEST_NAME = 255
"""Bytes of a file's name, on all common file systems."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Pickles that a trainer writes next to the weights: not the weights themselves.
_TRAINER_PICKLES = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state")

# Tokenizers in formats other than tokenizer.json.
_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "tiktoken.model")


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder whose files are complete. `weight_bytes` counts the tensors only."""

    folder: Path
    config: dict[str, Any]
    weight_files: list[Path]
    tensors: dict[str, TensorHeader]
    tensor_files: dict[str, Path]
    weight_bytes: int

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The quantization_config of config.json; None if the weights are not quantized."""
        return self.config.get("quantization_config")


def inspect(folder: Path) -> Checkpoint:
    """Read config and weight headers of `folder`, and check every file against its header.

    Raises UserError if the config or weights are missing, malformed, truncated or available only as pickles.
    """
    folder = Path(folder)
    config = read_config_file(folder)
    index, files = _indexed_files(folder)
    tensors: dict[str, TensorHeader] = {}
    tensor_files: dict[str, Path] = {}
    weight_bytes = 0
    for file in files:
        for name, place in read_places(file).items():
            if name in tensors:
                raise UserError(
                    f"{file} contains {name}, and so does {tensor_files[name].name}: fetch the model again."
                )
            tensors[name], tensor_files[name] = place.header, file
            weight_bytes += place.end - place.start
    _check_index(folder, index, tensor_files)
    return Checkpoint(
        folder=folder,
        config=config,
        weight_files=files,
        tensors=tensors,
        tensor_files=tensor_files,
        weight_bytes=weight_bytes,
    )


def require_tokenizer(folder: Path) -> None:
    """Raise UserError unless `folder` has a tokenizer that can be read."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        _read_json(folder / "tokenizer.json")
        return
    others = [name for name in _OTHER_TOKENIZERS if (folder / name).exists()]
    if others:  # transformers converts them with further libraries, and the ids may differ
        raise UserError(
            f"{folder} has its tokenizer only as {_list(others)}, but fettle reads only tokenizer.json: fetch the "
            "tokenizer.json of the same model, or of another one with the same tokenizer."
        )
    raise UserError(f"{folder} has no tokenizer: add the model's tokenizer.json and tokenizer_config.json.")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` contains a PEFT adapter rather than a full model."""
    return (Path(folder) / "adapter_config.json").exists()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration after checking its weights file; raises UserError if either is faulty."""
    folder = Path(folder)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise UserError(f"{folder} is not an adapter: it has no adapter_config.json.")
    config = _read_json(file)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file} does not name the adapter's base model: "
            f'set "base_model_name_or_path" to its folder or hub name.'
        )
    read_places(_require_weights(folder, ADAPTER_WEIGHTS))
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model or an adapter, all present; raises UserError otherwise."""
    folder = Path(folder)
    if is_adapter(folder):
        return [_require_weights(folder, ADAPTER_WEIGHTS)]
    return _indexed_files(folder)[1]


def _indexed_files(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """Return the index (tensor -> file name; None for a single file) and the weight files, all present."""
    if (folder / WEIGHTS).exists() or not (folder / WEIGHTS_INDEX).exists():
        return None, [_require_weights(folder, WEIGHTS)]
    index_file = folder / WEIGHTS_INDEX
    index = _read_json(index_file).get("weight_map")
    if not isinstance(index, dict) or not index or not all(_is_file_name(v) for v in index.values()):
        raise UserError(f'{index_file} has no "weight_map" from tensor names to files: fetch it again.')
    names = sorted(set(index.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{index_file} names {len(names)} weight files, but {_list(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing from {folder}: fetch the rest of the model."
        )
    return index, [folder / name for name in names]


def _is_file_name(value: object) -> bool:
    """Whether the value is a plain file name: a shard is in the same folder as its index."""
    if not isinstance(value, str) or len(value.encode(errors="replace")) > LONGEST_NAME:
        return False
    return value not in ("", ".", "..") and Path(value).name == value


def _check_index(folder: Path, index: dict[str, str] | None, tensor_files: dict[str, Path]) -> None:
    for name, file_name in (index or {}).items():
        if tensor_files.get(name) != folder / file_name:
            raise UserError(
                f"{folder / WEIGHTS_INDEX} says {name} is in {file_name}, but that file does not contain it: "
                f"fetch the model's files again, all from one version."
            )


def _require_weights(folder: Path, name: str) -> Path:
    """Return the single weight file `name`, or raise UserError that says what was found instead."""
    if (folder / name).exists():
        return folder / name
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    pickles = [file for file in pickles if not _TRAINER_PICKLES.match(file)]
    if pickles:
        raise UserError(
            f"{folder} has its weights only as {_list(pickles)}, a pickle that can run any code when opened, "
            f"so fettle never loads it: convert it to {name} or fetch the safetensors version of the model."
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others and name == WEIGHTS:
        raise UserError(
            f"{folder} has {_list(others)} but neither {WEIGHTS} nor {WEIGHTS_INDEX}: "
            f"a single weight file must be called {WEIGHTS}, and shards need their index."
        )
    raise UserError(f"{folder} has no weights: {name} is missing.")


def read_config_file(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's config.json; raises UserError if it is missing or not a model's."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if not file.exists():
        if command := command_to_finish(folder):
            raise UserError(f"{folder} is an unfinished run, not a model: finish it with {command}")
        raise UserError(f"{folder} is not a model folder: it has no config.json.")
    config = _read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f'{file} has no "model_type" (such as "phi3"): fetch the model\'s own config.json.')
    return config


def command_to_finish(run: Path) -> str | None:
    """Return the command that resumes the run in this folder, according to its run.yaml; None if it has none."""
    file = run / "run.yaml"
    if not file.is_file():
        return None
    first_line = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    command = "pretrain" if "fettle pretrain" in first_line else "train"
    return f"fettle {command} --resume --output {shell_path(run)}"


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; raises UserError with the line at which it is malformed."""
    require_content(file)
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is malformed JSON at line {error.lineno}, column {error.colno} ({error.msg}): "
            f"fix it or fetch it again."
        ) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, numbers of thousands of digits, nested too deeply
        raise UserError(f"{file} is not valid JSON: fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} contains a JSON {type(content).__name__}; expected an object.")
    return content


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_nf4(checkpoint: Checkpoint) -> bool:
    """Whether the stored weights are in bitsandbytes' NF4."""
    config = checkpoint.quantization_config or {}
    return bool(config.get("load_in_4bit")) and config.get("bnb_4bit_quant_type") == "nf4"
