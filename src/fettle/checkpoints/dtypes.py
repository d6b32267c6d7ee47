"""The types of weights: how fettle's options, safetensors and PyTorch name them."""

from typing import Literal

import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What --dtype takes; "auto" means as stored."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By --dtype's names, which are those of config.json too."""

SAFETENSORS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""By the names in a safetensors header, as far as fettle reads or writes them."""


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name as options and config.json have it."""
    return str(dtype).removeprefix("torch.")
