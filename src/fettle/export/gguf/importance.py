"""llama.cpp's importance matrix: the weight of errors in each input column of a matrix."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from fettle.errors import UserError, reason_of
from fettle.export.gguf.write import Importance

SUMS, COUNTS = ".in_sum2", ".counts"


def read_importance(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Importance:
    """Return the mean squared input of each column, by GGUF tensor name, from a file of llama-imatrix.

    shapes: the model's, by GGUF tensor name. Raises UserError for another type of file, one made for another model, or
    one with NaN or Inf.
    """
    if not (found := _means(path)):
        raise UserError(f"{path}: contains no importance matrix; expected a .gguf file from llama-imatrix.")
    for name, means in found.items():
        width = shapes[name][-1] if name in shapes else None
        if len(means) != width:
            expected = "no such tensor" if width is None else f"{width} columns"
            raise UserError(
                f"{path}: made for another model: it has {len(means)} values for {name}, but this model has "
                f"{expected}; run llama-imatrix on this model."
            )
        if not np.isfinite(means).all():
            raise UserError(
                f"{path}: its values for {name} contain NaN or Inf; run llama-imatrix again, with an undamaged model."
            )
    return found


def _means(path: Path) -> dict[str, np.ndarray]:
    """Return the file's means; ones for a tensor without counts, as in llama.cpp."""
    try:
        tensors = {
            each.name: np.array(each.data, dtype=np.float32).ravel()
            for each in GGUFReader(path).tensors
            if each.name.endswith((SUMS, COUNTS))
        }
    except Exception as error:  # the reader's parser raises many types
        raise UserError(
            f"{path}: not a readable importance matrix ({reason_of(error)}); expected a .gguf file from llama-imatrix."
        ) from error
    means = {}
    for owner in (name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)):
        sums, counts = tensors[owner + SUMS], tensors.get(owner + COUNTS, np.zeros(1))
        means[owner] = sums / counts[0] if counts[0] > 0 else np.ones_like(sums)
    return means
