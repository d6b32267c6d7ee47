"""Choose the device of a model and the dtype of its weights.

This imports no model code: a plan, which needs only config.json, uses it without waiting for transformers.
"""

from typing import TYPE_CHECKING

import torch

from fettle.checkpoints.dtypes import DTYPES, Dtype
from fettle.errors import UserError, option

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def device_of(name: str | torch.device | None) -> torch.device:
    """Return the device of that name; None means CUDA if available, else the CPU.

    Raises UserError for an unknown name, and for a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{option('device')} is {name!r}; expected cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{option('device')} is '{device}'; expected cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{option('device')} is '{device}', but PyTorch finds no such device; use cpu.")
    return device


def training_dtype(asked: Dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of frozen weights in training.

    fp16 underflows on small gradients, so for it "auto" means fp32, which represents its weights exactly, or on a GPU
    bf16, which saves memory.
    """
    if asked != "auto":
        return DTYPES[asked]
    if stored != torch.float16:
        return stored
    is_narrow = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if is_narrow else torch.float32


def maps_embedding(
    config: "PreTrainedConfig", stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a model in NF4 leaves its token embedding memory-mapped in its file.

    That is so on a CPU, if the stored dtype is the one to use and the embedding is not tied to the head.
    """
    return device.type == "cpu" and stored == dtype and not config.tie_word_embeddings
