"""Weight dtypes, by their names in fettle's options, in safetensors files and in PyTorch."""

from typing import Literal

import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Values of --dtype; "auto" means as stored."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By the names of --dtype, which config.json uses too."""

SAFETENSORS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""By the names in a safetensors header; the dtypes that fettle reads or writes."""


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as in options and config.json."""
    return str(dtype).removeprefix("torch.")
