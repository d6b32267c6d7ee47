"""Facts that fettle stores next to an adapter, in `fettle.json`; PEFT's own files have no field for them.

base_fingerprint: of the base weights it was trained on, so that a different base is refused.
context_tokens: the context for which LongRoPE's factors were fixed in training (see models/rope.py); null if each
document decided by its own length.
quantization: how the base's weights were stored in training; the adapter fits those weights.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fettle.checkpoints.fingerprint import fingerprint
from fettle.errors import UserError

FILE = "fettle.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    """The contents of `fettle.json`."""

    base_fingerprint: str
    context_tokens: int | None = None
    quantization: Literal["nf4"] | None = None


def write_facts(folder: Path, facts: AdapterFacts) -> None:
    """Write the facts into an adapter folder that is being created."""
    (folder / FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")


def read_facts(folder: Path) -> AdapterFacts | None:
    """Return the adapter's facts; None for an adapter that fettle did not train."""
    file = folder / FILE
    if not file.exists():
        return None
    try:
        facts = AdapterFacts(**json.loads(file.read_text(encoding="utf-8")))
        if not _is_as_written(facts):
            raise TypeError
        return facts
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is malformed, so the base model's weights cannot be checked; "
            "fetch it again, or delete it to skip that check."
        ) from error


def _is_as_written(facts: AdapterFacts) -> bool:
    context = facts.context_tokens
    return (
        isinstance(facts.base_fingerprint, str)
        and (context is None or (type(context) is int and 0 < context < 2**31))
        and facts.quantization in (None, "nf4")
    )


def require_base(folder: Path, facts: AdapterFacts, base_folder: Path) -> None:
    """Raise UserError if the base's weights are not those that the adapter in `folder` was trained on."""
    if facts.base_fingerprint != fingerprint(base_folder):
        raise UserError(
            f"{folder}: the adapter was trained on different weights from those now in {base_folder}; "
            f"restore the original base model, or correct base_model_name_or_path in "
            f"{folder / 'adapter_config.json'}."
        )
