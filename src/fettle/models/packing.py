"""Find the documents of packed rows: a document begins wherever the positions restart.

Stock transformers looks for restarts only without an attention mask and without a cache, and otherwise attends across
documents. Here every forward pass that starts a row looks for them.

Shapes: B rows, N tokens per row.
"""

import torch

from fettle.ops import Documents


def find_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | dict[str, torch.Tensor] | None
) -> Documents | None:
    """Return the documents of packed rows, or None if no row restarts its positions.

    position_ids: (B, N). A document starts at every position that is neither one more than its predecessor nor, in
    rows with padding (zeros in a (B, N) mask), one more than that of the last real token. Padding may have any
    positions.
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
    return Documents.from_starts(is_start.flatten())


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
