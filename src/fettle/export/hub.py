"""Upload an export to the Hugging Face hub, with a model card that says how it was made."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fettle.adapters.model_ref import ModelRef, resolve
from fettle.errors import UserError, option, reason_of

CARD = "README.md"
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"


def require_hub(name: str) -> None:
    """Raise UserError unless the hub can be reached and the user is logged in, before anything is computed."""
    from huggingface_hub import HfApi

    if not re.fullmatch(HUB_NAME, name):
        raise UserError(f"{option('push')} is {name!r}; expected a hub name, owner/name.")
    try:
        HfApi().whoami()
    except Exception as error:  # no network, no token, an expired token: the library has a class for each
        raise UserError(
            f"{option('push')} {name}: not logged in to the hub, or the hub cannot be reached ({reason_of(error)}): "
            f"log in with `hf auth login`, or export without {option('push')}."
        ) from error


def push(files: Sequence[Path], name: str, card: str) -> str:
    """Upload the export to `name`, created as a private repository if it does not exist, and return its URL.

    files: one folder, or files of one folder; they are kept. card: from `model_card`; an existing card is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        for file in files:
            if file.is_dir():
                api.upload_folder(repo_id=name, folder_path=str(file))
            else:
                api.upload_file(repo_id=name, path_or_fileobj=str(file), path_in_repo=file.name)
        if not api.file_exists(name, CARD):
            api.upload_file(repo_id=name, path_or_fileobj=card.encode(), path_in_repo=CARD)
    except Exception as error:  # the hub and the network raise many types
        again = " and ".join(f"`hf upload {name} {file}`" for file in files)
        raise UserError(
            f"the upload to {name} failed ({reason_of(error)}), but the export is complete: upload it with {again}."
        ) from error
    return f"https://huggingface.co/{name}"


def model_card(model: str, file_name: str, name: str, export_format: str) -> str:
    """Return the card: YAML metadata for the hub, then how to use the model and how it was trained.

    model: the exported model; file_name: of the export; name: on the hub; export_format: the --format.
    """
    ref = resolve(model)
    uses = {
        "gguf": f"llama-server -hf {name}",
        "adapter-gguf": f"llama-server -m BASE.gguf --lora {file_name}",
    }
    settings = _settings(ref.path)
    origin = "Exported with fettle." if settings is None else "Fine-tuned and exported with fettle."
    lines = ["---", yaml.safe_dump(_head(ref, export_format), sort_keys=False).strip(), "---", ""]
    lines += [
        f"# {name.partition('/')[2]}",
        "",
        origin,
        "",
        "```",
        uses.get(export_format, f"vllm serve {name}"),
        "```",
    ]
    if settings is not None:
        lines += ["", "## How it was trained", "", "```yaml", settings, "```"]
    return "\n".join(lines) + "\n"


def _head(ref: ModelRef, export_format: str) -> dict[str, Any]:
    """Return the metadata that the hub indexes."""
    is_file = export_format in ("gguf", "adapter-gguf")
    head: dict[str, Any] = {
        "library_name": "gguf" if is_file else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fettle", *(["gguf"] if is_file else [])],
    }
    if re.fullmatch(HUB_NAME, ref.base_name):  # not an absolute path
        head["base_model"] = ref.base_name
    return head


def _settings(folder: Path) -> str | None:
    """Return the run's options, without paths on this machine."""
    file = folder / "run.yaml"
    if not file.exists():
        return None
    try:
        options = dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is malformed ({reason_of(error)}), but the model card quotes it: fix it, or delete it to push "
            "without it."
        ) from error
    kept = (
        "rank",
        "alpha",
        "learning_rate",
        "epochs",
        "max_steps",
        "max_length",
        "batch_size",
        "quantization",
        "seed",
    )
    return yaml.safe_dump(
        {key: options[key] for key in kept if options.get(key) is not None}, sort_keys=False
    ).strip()
