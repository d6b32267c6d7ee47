"""What `--model` names, resolved and checked in one place: a checkpoint, an adapter with its base, or a GGUF file.

`fettle plan` resolves names too, and must start fast: transformers and PEFT are imported when a property needs them.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fettle.checkpoints.adapter_facts import AdapterFacts, read_facts, require_base
from fettle.checkpoints.folder import Checkpoint, inspect, is_adapter, read_adapter_config
from fettle.checkpoints.locate import locate
from fettle.errors import UserError, reason_of
from fettle.files import lasting_name
from fettle.models.config import StoredModel, config_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from fettle.adapters.lora import TensorShapes


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """What a model's name refers to. Files are read, and checked, when a property needs them; weights never.

    name: an absolute path, a hub name or fettle-tiny. path: of the folder or the GGUF file. base_name and base: of the
    checkpoint that an adapter belongs to; otherwise name and path again. facts: of an adapter that fettle trained.
    """

    kind: Literal["checkpoint", "adapter", "gguf"]
    name: str
    path: Path
    base_name: str
    base: Path
    facts: AdapterFacts | None = None

    @property
    def paths(self) -> list[Path]:
        """Return everything that the model is read from: its path, and an adapter's base."""
        return list(dict.fromkeys((self.path, self.base)))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base's files."""
        return inspect(self.base)

    @cached_property
    def stored(self) -> StoredModel:
        """What the base stores, with the adapter's vocabulary size.

        Raises UserError if config, weights and adapter do not belong together.
        """
        from fettle.models.load import stored_model

        stored = stored_model(self.checkpoint)
        self._fit(stored.config)
        if self.facts is not None:
            require_base(self.path, self.facts, self.base)
        return stored

    def stored_by_config(self, *, is_plain: bool = False) -> StoredModel:
        """Like `stored`, according to config.json alone. is_plain: see `config_of`; to check an adapter takes more."""
        stored = config_of(self.base, is_plain=is_plain and self.kind != "adapter")
        self._fit(stored.config)
        return stored

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The adapter's own tokenizer, or the base's."""
        return self.tokenizer_for(self.stored)

    def tokenizer_for(self, stored: StoredModel) -> "PreTrainedTokenizerBase":
        """Like `tokenizer`, for what `stored` or `stored_by_config` returned; the latter needs no weights."""
        from fettle.models.load import load_tokenizer

        has_tokenizer = (self.path / "tokenizer.json").exists()
        return load_tokenizer(self.path if has_tokenizer else self.base, stored.config)

    @cached_property
    def lora(self) -> "LoraConfig":
        """The adapter's configuration."""
        from fettle.adapters.lora import adapter_config_of

        return adapter_config_of(self.path)

    @cached_property
    def shapes(self) -> "TensorShapes":
        """The shapes of the adapter's tensors."""
        from fettle.adapters.lora import shapes_in

        return shapes_in(self.path)

    def _fit(self, config: Any) -> None:
        """Set the vocabulary size to the adapter's. Raises UserError if the adapter does not fit the base."""
        if self.kind != "adapter":
            return
        from fettle.adapters.lora import require_fit
        from fettle.adapters.vocabulary import rows_with
        from fettle.models.load import empty_model

        config.vocab_size = rows_with(config, self.lora, self.shapes, self.path)
        require_fit(empty_model(config), self.shapes, self.path)


def resolve(name: str | Path, *, need: Literal["config", "weights", "run"] = "weights") -> ModelRef:
    """Return what `name` refers to; a hub model is downloaded.

    need: what the caller does with the model. "config" downloads no weights of a checkpoint; "run" accepts a GGUF file,
    which has no weights in PyTorch. Raises UserError if the model or an adapter's base cannot be found.
    """
    path = locate(str(name), config_only=need == "config")
    if path.is_file() and need != "run":
        raise UserError(
            f"{path} is a GGUF file, which can only be run (with fettle generate, chat and compare): "
            "give the Hugging Face folder or hub name it was made from."
        )
    found = lasting_name(str(name))
    if not is_adapter(path):
        kind: Literal["gguf", "checkpoint"] = "gguf" if path.is_file() else "checkpoint"
        return ModelRef(kind=kind, name=found, path=path, base_name=found, base=path)
    base_name, base = _base_of(path, config_only=need == "config")
    return ModelRef(
        kind="adapter", name=found, path=path, base_name=base_name, base=base, facts=read_facts(path)
    )


def _base_of(adapter: Path, *, config_only: bool) -> tuple[str, Path]:
    """Return the name and the folder of the checkpoint that the adapter belongs to."""
    name: str = read_adapter_config(adapter)["base_model_name_or_path"]
    try:
        base = locate(name, config_only=config_only)
        if base.is_file() or is_adapter(base):
            found = "a GGUF file" if base.is_file() else "an adapter itself"
            raise UserError(f"it is {found}; expected a model with all its weights.")
    except UserError as error:
        raise UserError(
            f"{adapter} is an adapter for '{name}', which cannot be opened: {reason_of(error)} If the model has "
            f"moved, correct base_model_name_or_path in {adapter / 'adapter_config.json'}."
        ) from error
    return lasting_name(name), base
