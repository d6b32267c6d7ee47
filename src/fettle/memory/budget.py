"""How much memory a run may use: as the user says it, or as the device has it."""

import re

import psutil
import torch

from fettle.errors import UserError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SHARE = 0.92
"""Of what is free now: the rest is for other programs, and for the allocator's gaps."""


def parse_bytes(text: str, option: str = "--memory") -> int:
    """Return the bytes that "16GB", "7.5 GiB" or "8g" mean. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if found is None or not float(found[1]):
        raise UserError(
            f"{option} is {text!r}; expected an amount of memory such as 16GB (10^9 bytes) or 16GiB (2^30)."
        )
    return int(float(found[1]) * _UNITS[found[2]])


def free_bytes(device: torch.device) -> int:
    """What this process may use of the device's memory, with what it uses already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(SHARE * (free + torch.cuda.memory_reserved(device)))
    own = psutil.Process().memory_info().rss
    return int(SHARE * (psutil.virtual_memory().available + own))
