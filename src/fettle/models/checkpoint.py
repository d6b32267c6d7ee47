"""Checkpoint folders: find one, and know what is in it before a byte of weights is loaded.

A checkpoint is a folder with `config.json`, a tokenizer and weights as safetensors, in one file or in shards
listed by an index. Only their headers are read here. Pickled weights (`*.bin`, `*.pt`) can run any code when
they are opened: they are refused, never loaded. Code beside a checkpoint (`auto_map`) is never run either.

Nothing here imports torch: a command line finds a faulty checkpoint at once.
"""

import difflib
import hashlib
import importlib.resources
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fettle.errors import UserError
from fettle.files import require_free_space, sha256_of, shell_path
from fettle.models.safetensors_header import Place, TensorHeader, read_places, require_content

EMBEDDED = "fettle-tiny"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Pickles that a trainer leaves beside the weights: not the weights themselves.
_TRAINER_PICKLES = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state")

# Tokenizers in other forms than tokenizer.json.
_OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "tiktoken.model")

# What is fetched from a hub: the top folder's data, nothing that can be run, no second copy of the weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_HUB_LEFT = ["*/*", "consolidated*"]


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder whose files have been found whole. `weight_bytes` counts the tensors alone."""

    folder: Path
    config: dict[str, Any]
    weight_files: list[Path]
    tensors: dict[str, TensorHeader]
    tensor_files: dict[str, Path]
    weight_bytes: int

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """How the stored weights are quantised, as config.json says it; None where they are not."""
        return self.config.get("quantization_config")


# --- finding it --------------------------------------------------------------------------------------------


def locate(name: str) -> Path:
    """Return the checkpoint folder that `name` means: a folder, "fettle-tiny", or a hub name "owner/name".

    A hub model's data files are downloaded into the hub's cache, or found there.
    Raises UserError where there is no such folder, or the hub cannot give it.
    """
    if not name:
        raise UserError("the model's name is empty: give a folder or a hub name (owner/name).")
    try:
        path = Path(name).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # longer than a path may be, an unreadable place, ~nobody
        raise UserError(f"{name!r} cannot be a folder ({error}): give a folder or a hub name.") from error
    if is_folder:
        return path
    if is_there:
        raise UserError(_not_a_folder(path))
    if name == EMBEDDED:
        return embedded_model()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _download(name)
    raise UserError(_no_such_folder(path))


def embedded_model() -> Path:
    """Return the folder of the model that ships inside the package."""
    folder = Path(str(importlib.resources.files("fettle"))) / "tiny" / "checkpoint"
    if not folder.is_dir():
        raise UserError(f"{EMBEDDED} is missing from this installation ({folder}): install fettle-llm again.")
    return folder


def _not_a_folder(path: Path) -> str:
    if path.suffix == ".gguf":
        return (
            f"{path} is a GGUF file, which is made for running a model (fettle generate, chat and compare open it): "
            f"give the Hugging Face folder or hub name it was made from."
        )
    if any(path.match(pattern) for pattern in _PICKLES):
        return (
            f"{path} is a file of pickled weights, which fettle never loads: "
            f"give a folder with the model as safetensors."
        )
    return f"{path} is a file, not a model: give the folder that holds config.json, tokenizer and weights."


def _no_such_folder(path: Path) -> str:
    near = difflib.get_close_matches(path.name, _folders_beside(path), n=1)
    advice = f"did you mean {path.parent / near[0]}?" if near else "a hub model is written owner/name."
    return f"no such folder: {path}; {advice}"


def _folders_beside(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    return [entry.name for entry in path.parent.iterdir() if entry.is_dir()]


def _download(name: str) -> Path:
    """Fetch hub model `name`, or find it in the hub's cache; every failure is one sentence."""
    from huggingface_hub import constants, errors, snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": _HUB_LEFT}
    try:
        try:
            files = snapshot_download(name, dry_run=True, **wanted)
        except errors.DryRunError:  # no answer from the hub: the cache may still have it
            files = []
        missing_bytes = sum(file.file_size for file in files if file.will_download)
        require_free_space(Path(constants.HF_HUB_CACHE), missing_bytes, f"downloading {name}")
        return Path(snapshot_download(name, **wanted))
    except UserError:
        raise
    except Exception as error:  # the hub's transport library, and so its errors, differ between versions
        raise UserError(_hub_failure(name, error)) from error


def _hub_failure(name: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    path = Path(name)
    near = difflib.get_close_matches(path.name, _folders_beside(path), n=1)
    hint = f" (did you mean the folder {path.parent / near[0]}?)" if near else ""
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated on the hub: accept its terms on its page, then log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is neither a folder here nor a model on the hub{hint}: check the spelling, "
            f"and log in with `hf auth login` if it is private."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        cure = "unset it" if constants.HF_HUB_OFFLINE else "check the network"
        return (
            f"{name} is neither a folder here nor in the hub's cache, and {reason}{hint}: {cure}, "
            f"or give the path of a folder with the model."
        )
    first_line = (str(error).splitlines() or [""])[0]
    return f"{name} could not be downloaded ({type(error).__name__}: {first_line}){hint}: try again later."


# --- what is in it -----------------------------------------------------------------------------------------


def inspect(folder: Path) -> Checkpoint:
    """Read config and weight headers of `folder`, and check every file against its header.

    Raises UserError where the config or weights are missing, malformed, truncated or only pickled.
    """
    folder = Path(folder)
    config = _read_config(folder)
    index, files = _indexed_files(folder)
    tensors: dict[str, TensorHeader] = {}
    tensor_files: dict[str, Path] = {}
    weight_bytes = 0
    for file in files:
        for name, place in read_places(file).items():
            if name in tensors:
                raise UserError(
                    f"{file} holds {name}, which {tensor_files[name].name} holds too: fetch the model again."
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
    if others:  # what transformers makes of them depends on further libraries, and may give other ids
        raise UserError(
            f"{folder} has its tokenizer only as {_list(others)}, and fettle reads tokenizer.json alone: fetch the "
            "tokenizer.json of the same model, or of another one with the same tokenizer."
        )
    raise UserError(
        f"{folder} has no tokenizer: put the model's tokenizer.json and tokenizer_config.json there."
    )


def is_adapter(folder: Path) -> bool:
    """Say whether `folder` holds a PEFT adapter rather than a full model."""
    return (Path(folder) / "adapter_config.json").exists()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the adapter's configuration, having found its weights whole; raises UserError otherwise."""
    folder = Path(folder)
    file = folder / "adapter_config.json"
    if not file.exists():
        raise UserError(f"{folder} is not an adapter: it has no adapter_config.json.")
    config = _read_json(file)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file} does not name the model the adapter belongs to: "
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


def fingerprint(folder: Path) -> str:
    """Return a SHA-256, in hex, that is equal for equal weights however they are sharded.

    It covers every tensor's name, type, shape and a sample of at most 4 kB of its bytes, spread over the
    whole tensor: quick on any size, and different once an optimizer or a merge has touched the weights.
    Works for a model and for an adapter.
    """
    digests: dict[str, bytes] = {}
    for file in weight_files(folder):
        places = read_places(file)
        with open(file, "rb") as stream:
            for name, place in places.items():
                digests[name] = _sample_digest(stream, place)
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(hashlib.sha256(name.encode()).digest() + digests[name])
    return total.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """Return a SHA-256, in hex, of what turns rows into tokens and answers into an end: the tokenizer's files."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    return sha256_of(Path(folder) / name for name in names if (Path(folder) / name).exists())


def _sample_digest(stream: BinaryIO, place: Place, pieces: int = 16, piece_bytes: int = 256) -> bytes:
    """Hash a tensor's type, shape and `pieces` evenly spread pieces of its bytes, first and last included."""
    digest = hashlib.sha256(json.dumps(place.header).encode())
    size = place.end - place.start
    if size <= pieces * piece_bytes:
        stream.seek(place.start)
        digest.update(stream.read(size))
        return digest.digest()
    for piece in range(pieces):
        stream.seek(place.start + (size - piece_bytes) * piece // (pieces - 1))
        digest.update(stream.read(piece_bytes))
    return digest.digest()


# --- weight files ------------------------------------------------------------------------------------------


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
    """A shard stands beside its index: a path that leads elsewhere is no shard's name."""
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value


def _check_index(folder: Path, index: dict[str, str] | None, tensor_files: dict[str, Path]) -> None:
    for name, file_name in (index or {}).items():
        if tensor_files.get(name) != folder / file_name:
            raise UserError(
                f"{folder / WEIGHTS_INDEX} says {name} is in {file_name}, but that file does not hold it: "
                f"fetch the model's files again, all from one version."
            )


def _require_weights(folder: Path, name: str) -> Path:
    """Return the single weight file `name`, or raise UserError saying what is there in its stead."""
    if (folder / name).exists():
        return folder / name
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
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


# --- small readers -----------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    if not file.exists():
        if command := command_to_finish(folder):
            raise UserError(
                f"{folder} holds a run that was stopped before its end, not a model yet: finish it with {command}"
            )
        raise UserError(f"{folder} is not a model folder: it has no config.json.")
    return read_config_file(file)


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the content of a model's config.json; raises UserError for what is none."""
    config = _read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f'{file} has no "model_type" (such as "phi3"): fetch the model\'s own config.json.')
    return config


def command_to_finish(run: Path) -> str | None:
    """The command that goes on with the run whose folder this is, told by its run.yaml; None where it has none."""
    file = run / "run.yaml"
    if not file.is_file():
        return None
    first_line = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    command = "pretrain" if "fettle pretrain" in first_line else "train"
    return f"fettle {command} --resume --output {shell_path(run)}"


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; raises UserError with the line where it is malformed."""
    require_content(file)
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is malformed JSON at line {error.lineno}, column {error.colno} ({error.msg}): "
            f"mend it or fetch it again."
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, numbers of thousands of digits, nested too deep
        raise UserError(f"{file} is not JSON text: fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__} where an object was expected.")
    return content


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_nf4(checkpoint: Checkpoint) -> bool:
    """Whether the stored weights are in bitsandbytes' NF4."""
    config = checkpoint.quantization_config or {}
    return bool(config.get("load_in_4bit")) and config.get("bnb_4bit_quant_type") == "nf4"
