"""Find the folder or file of a model: local, the embedded model, or a hub model, which is downloaded."""

import difflib
import importlib.resources
import re
from pathlib import Path
from typing import Any

from fettle.checkpoints.folder import PICKLES
from fettle.errors import UserError
from fettle.files import require_free_space

EMBEDDED = "fettle-tiny"
GGUF_MAGIC = b"GGUF"

# Fetched from a hub: data files of the top folder; no code and no second copy of the weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_HUB_LEFT = ["*/*", "consolidated*"]
_HUB_CONFIGS = ["config.json", "adapter_*.json", "adapter_*.safetensors"]


def locate(name: str, *, config_only: bool = False) -> Path:
    """Return what `name` refers to: a folder, a GGUF file, "fettle-tiny", or a hub name "owner/name".

    A file counts as GGUF by its extension or by its first bytes (in Ollama's store). A hub model's data files are
    downloaded into the hub's cache unless they are there already; config_only: only its config, or an adapter.
    Raises UserError if there is no such folder or file, or if the download fails.
    """
    if not name:
        raise UserError("the model's name is empty: give a folder or a hub name (owner/name).")
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a path that is too long, an unreadable folder, ~nobody
        raise UserError(f"{name!r} is not a valid path ({error}): give a folder or a hub name.") from error
    if is_folder:
        return path
    is_gguf = path.suffix.lower() == ".gguf"
    if (is_gguf or is_file) and (gguf_magic_of(path) == GGUF_MAGIC or is_gguf):
        return path
    if path.exists():
        raise UserError(_not_a_model(path))
    if name == EMBEDDED:
        return embedded_model()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return _download(name, _HUB_CONFIGS if config_only else _HUB_FILES)
    raise UserError(_no_such_folder(path))


def embedded_model() -> Path:
    """Return the folder of the model that ships inside the package."""
    folder = Path(str(importlib.resources.files("fettle"))) / "tiny" / "checkpoint"
    if not folder.is_dir():
        raise UserError(f"{EMBEDDED} is missing from this installation ({folder}): reinstall fettle-llm.")
    return folder


def _not_a_model(path: Path) -> str:
    if any(path.match(pattern) for pattern in PICKLES):
        return (
            f"{path} is a pickle, which fettle never loads as it can run any code: "
            f"give a folder with the model as safetensors."
        )
    return f"{path} is a file, not a model: give the folder with config.json, tokenizer and weights."


def _no_such_folder(path: Path) -> str:
    near = difflib.get_close_matches(path.name, _folders_beside(path), n=1)
    advice = f"did you mean {path.parent / near[0]}?" if near else "a hub model is written owner/name."
    return f"no such folder: {path}; {advice}"


def _folders_beside(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    return [entry.name for entry in path.parent.iterdir() if entry.is_dir()]


def _download(name: str, patterns: list[str]) -> Path:
    """Download the files of hub model `name`, or find it in the hub's cache; raises UserError for every failure."""
    from huggingface_hub import constants, errors, snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": _HUB_LEFT}
    try:
        try:
            files = snapshot_download(name, dry_run=True, **wanted)
        except errors.DryRunError:  # the hub does not respond: the cache may still have it
            files = []
        missing_bytes = sum(file.file_size for file in files if file.will_download)
        require_free_space(Path(constants.HF_HUB_CACHE), missing_bytes, f"downloading {name}")
        return Path(snapshot_download(name, **wanted))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # the hub's transport library, and with it the exceptions, differ between versions
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
            f"{name} is neither a local folder nor a model on the hub{hint}: check the spelling, "
            f"and log in with `hf auth login` if it is private."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        cure = "unset it" if constants.HF_HUB_OFFLINE else "check the network"
        return (
            f"{name} is neither a local folder nor in the hub's cache, and {reason}{hint}: {cure}, "
            f"or give the path of a folder with the model."
        )
    first_line = (str(error).splitlines() or [""])[0]
    return f"{name} could not be downloaded ({type(error).__name__}: {first_line}){hint}: try again later."


def gguf_magic_of(path: Path) -> bytes:
    """Return the file's first bytes, which are GGUF_MAGIC in a GGUF file. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a GGUF file.") from error
