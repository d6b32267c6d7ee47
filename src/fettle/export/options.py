"""The options of `fettle export`. Nothing here imports torch, so a wrong command line is answered at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fettle.checkpoints.dtypes import Dtype

Format = Literal["safetensors", "nf4", "fp8", "w4a16", "gguf", "adapter-gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """As on the command line; options of another format are refused."""

    model: str
    to: Path
    format: Format = "safetensors"
    overwrite: bool = False
    dtype: "Dtype" = "auto"
    data: str | None = None
    quantization: list[str] | None = None
    importance_matrix: Path | None = None
    verify: bool = False
    ollama: bool = False
    push: str | None = None


ONLY_FOR: dict[str, tuple[Format, ...]] = {
    "dtype": ("safetensors", "nf4"),
    "data": ("fp8", "w4a16"),
    "quantization": ("gguf",),
    "importance_matrix": ("gguf",),
    "verify": ("gguf",),
    "ollama": ("gguf",),
}
