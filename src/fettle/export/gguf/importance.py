"""llama.cpp's importance matrix: how much an error in each input column of a matrix counts."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader

from fettle.errors import UserError, reason_of
from fettle.export.gguf.write import Importance


def read_importance(path: Path) -> Importance:
    """Mean squared input of each column, by GGUF tensor name, from a file of llama-imatrix. UserError for another."""
    try:
        tensors = {
            each.name: np.array(each.data, dtype=np.float32).ravel() for each in GGUFReader(path).tensors
        }
    except Exception as error:  # whatever the reader's parsing raises
        raise UserError(
            f"{path}: not a readable importance matrix ({reason_of(error)}); expected llama-imatrix's .gguf."
        ) from error
    found = {}
    for name, sums in tensors.items():
        counts = tensors.get(name.replace(".in_sum2", ".counts"))
        if name.endswith(".in_sum2") and counts is not None:
            found[name.removesuffix(".in_sum2")] = sums / max(1.0, float(counts[0]))
    if not found:
        raise UserError(f"{path}: no importances in it; expected llama-imatrix's .gguf.")
    return found
