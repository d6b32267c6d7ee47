"""Find the documents of packed rows: a document begins wherever the positions restart.

Stock transformers looks for restarts only without an attention mask and without a cache, and otherwise attends across
documents. Here every forward pass that starts a row looks for them. A caller may ask that positions which restart above
0 mean a document that shares its first tokens with the last one that began at 0 (ops/shared_prefix.py).

Shapes: B rows, N tokens per row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fettle.ops import Documents


def find_documents(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    *,
    shares_prefixes: bool = False,
) -> Documents | None:
    """Return the documents of packed rows, or None if no row restarts its positions.

    position_ids: (B, N). A document starts at every position that is neither one more than its predecessor nor, in
    rows with padding (zeros in a (B, N) mask), one more than that of the last real token. Padding may have any
    positions. shares_prefixes: a document that starts at position p shares p tokens; for rows without a mask.
    """
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    if attention_mask is not None:
        is_real = attention_mask.bool()[:, -position_ids.shape[1] :]
        steps = torch.arange(is_real.shape[1], device=is_real.device)
        before = torch.where(is_real, steps, -1).cummax(dim=1).values[:, :-1]  # the last real token so far
        follows = position_ids[:, 1:] == position_ids.gather(1, before.clamp(min=0)) + 1
        breaks = breaks & is_real[:, 1:] & (before >= 0) & ~follows
        if not breaks.any():
            return None
        breaks = breaks | (is_real[:, 1:] != is_real[:, :-1])
    elif not breaks.any():
        return None
    is_start = torch.cat((torch.ones_like(breaks[:, :1]), breaks), dim=1)
    return Documents.from_starts(is_start.flatten(), position_ids.flatten() if shares_prefixes else None)


class PackedBatch(NamedTuple):
    """A padded batch as one row without padding. input_ids, position_ids: (1, T). places: (B, N), where each token of
    the batch is in that row; 0 for padding."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor


def pack_batch(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, *, share: bool
) -> PackedBatch:
    """Concatenate the real tokens of a batch's rows. All three are (B, N); a label of -100 is none.

    share: rows with the same prompt, which is what precedes their first label, share its tokens. It reads the device.
    """
    table = torch.stack((input_ids, attention_mask.to(input_ids.dtype), labels)).tolist()
    rows = [[n for n, is_real in enumerate(mask) if is_real] for mask in table[1]]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (row, ids, targets) in enumerate(zip(rows, table[0], table[2], strict=True)):
        prompt = next((n for n, at in enumerate(row) if targets[at] != -100), len(row)) if share else 0
        # rows that share nothing get a group of their own, under a key that is no token
        key = tuple(ids[at] for at in row[:prompt]) or (-1 - number,)
        groups.setdefault(key, []).append(number)
    packed: list[int] = []
    positions: list[int] = []
    places = [[0] * input_ids.shape[1] for _ in rows]
    for prompt_ids, members in groups.items():
        root = len(packed)
        for number in members:
            shared = len(prompt_ids) if len(packed) > root else 0
            for position, at in enumerate(rows[number]):
                if position < shared:
                    places[number][at] = root + position
                    continue
                places[number][at] = len(packed)
                packed.append(table[0][number][at])
                positions.append(position)
    made: Sequence[torch.Tensor] = [
        torch.tensor(each, device=input_ids.device) for each in ([packed], [positions], places)
    ]
    return PackedBatch(*made)


def row_documents(
    x: torch.Tensor, attention_mask: torch.Tensor | dict[str, torch.Tensor] | None
) -> Documents | None:
    """Return each row of x (B, N, ...) as one document, and the padding after it as another.

    Returns None for left padding, as stock models predict a row's first token from the padding, and for a mask that
    is more than a padding mask.
    """
    is_start = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    is_start[:, 0] = True
    if attention_mask is not None:
        if isinstance(attention_mask, dict) or attention_mask.shape != is_start.shape:
            return None
        is_real = attention_mask.bool()
        if not is_real[:, 0].all():
            return None
        is_start[:, 1:] |= is_real[:, 1:] != is_real[:, :-1]
    return Documents.from_starts(is_start.flatten())
