"""Where a model goes, and how its weights are held there.

Importing this imports no model code: a plan, which answers from config.json, needs it at once.
"""

from typing import TYPE_CHECKING

import torch

from fettle.checkpoints.dtypes import DTYPES, Dtype
from fettle.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def device_of(name: str | torch.device | None) -> torch.device:
    """Return the device of that name; None means CUDA where there is one, else the CPU.

    Raises UserError for a name that is none, and for a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; expected cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is '{device}'; expected cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is '{device}', but PyTorch finds no such device; use cpu.")
    return device


def training_dtype(asked: Dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to hold frozen weights in. fp16 loses small gradients: in its stead "auto" takes fp32, in which its
    weights are exact, or bf16, which is near enough, where memory counts."""
    if asked != "auto":
        return DTYPES[asked]
    if stored != torch.float16:
        return stored
    is_narrow = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if is_narrow else torch.float32


def maps_embedding(
    config: "PreTrainedConfig", stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a model in NF4 leaves its token table in its file: on a CPU, which can use it as it is stored, where it
    is not the head as well."""
    return device.type == "cpu" and stored == dtype and not config.tie_word_embeddings
