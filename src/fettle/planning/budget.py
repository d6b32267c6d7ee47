"""How much memory a run may use: the amount that the user gives, or what is free on the device.

Importing this module does not import torch, so that a malformed amount is rejected immediately.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fettle.errors import UserError, option

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SHARE = 0.92
"""Fraction of the free memory that a run may use; the rest is for other programs and for fragmentation."""
LEAST = 1e6
"""Bytes. A smaller number without a unit is taken for a mistake: nothing trains in less than a megabyte."""
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CGROUP_FILES = (  # limit, usage, and the reclaimable page cache counted in it: cgroup v2, then v1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def parse_bytes(text: str) -> int:
    """Return the bytes that "16GB", "7.5 GiB" or "8g" mean. Raises UserError naming `memory` for anything else."""
    found = re.fullmatch(
        r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})\s*((?:[kmgt]i?)?b?)\s*", text.lower()
    )
    if found and not found[2] and 0 < float(found[1]) < LEAST:
        raise UserError(
            f"{option('memory')} {found[1]} means {found[1]} bytes; for gigabytes write {found[1]}GB."
        )
    amount = int(float(found[1]) * _UNITS[found[2].removesuffix("b")]) if found else 0
    if amount < 1:
        raise UserError(
            f"{option('memory')} is {text!r}; expected an amount of memory such as 16GB (10^9 bytes) or 16GiB (2^30)."
        )
    return amount


def free_bytes(device: "torch.device") -> int:
    """Return the bytes of the device's memory that this process may use, including what it already uses."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(SHARE * (free + torch.cuda.memory_reserved(device)))
    own = psutil.Process().memory_info().rss
    return int(SHARE * (min([psutil.virtual_memory().available, *_free_in_container()]) + own))


def _free_in_container() -> list[int]:
    """Return the bytes left under the limit of each control group of this process; empty if none sets a limit."""
    return [free for group in _own_groups() for names in _CGROUP_FILES for free in _free_in(group, *names)]


def _own_groups() -> Iterator[Path]:
    """Yield the folders of this process's control groups, innermost first. A container may see its own as the root."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/"]:
        _, kinds, path = line.split(":", 2)
        top = CGROUPS / ("memory" if kinds else "")
        if not kinds or "memory" in kinds.split(","):
            own = top / path.lstrip("/")
            yield from (each for each in (own, *own.parents) if each.is_relative_to(top))


def _free_in(group: Path, limit_file: str, used_file: str, cache: str) -> Iterator[int]:
    """Yield the bytes left in one group, or nothing if it sets no limit below the machine's memory."""
    try:
        limit, used = (int((group / name).read_text()) for name in (limit_file, used_file))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group, the other cgroup version, or "max" (no limit)
        return
    if limit < psutil.virtual_memory().total:
        reclaimable = dict(line.split() for line in lines).get(cache, 0)
        yield max(0, limit - used + int(reclaimable))
