"""Hold out a part of the rows from training, to evaluate on rows that the model has not seen."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from fettle.data.rows import AnyRow

_MIN_ROWS = 10  # fewer rows are all needed for training
_ROWS_FOR_ONE = 20  # from here on at least one row is held out


def split_held_out(rows: Sequence[AnyRow], fraction: float, seed: int) -> tuple[list[AnyRow], list[AnyRow]]:
    """Return (training rows, held-out rows), each in the order of the input.

    The same rows, fraction and seed give the same split.  Identical rows stay on one side, as a row seen in training
    is no test of what was learned.  Of fewer than 10 rows none is held out, of 20 or more at least one, as far as
    identical rows allow.  For preference rows, those with the same question count as identical.
    """
    wanted = round(fraction * len(rows)) if len(rows) >= _MIN_ROWS else 0
    if fraction > 0 and len(rows) >= _ROWS_FOR_ONE:
        wanted = max(wanted, 1)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.content].append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [row for index, row in enumerate(rows) if index in held_out]
