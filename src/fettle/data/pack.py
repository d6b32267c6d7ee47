"""Packs: several documents in one row of tokens, so that no step computes padding.

Documents are placed longest first, each into the pack with the least sufficient space (best-fit decreasing; Ding et
al. 2024, "Fewer Truncations Improve Language Modeling").  A pack stores the lengths of its documents in
`seq_lengths`, and the collator turns them into `position_ids` that restart at 0.  The decoder finds the documents by
these restarts, and attention stays within a document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fettle.data.tokenize import Example

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def pack(examples: Sequence[Example], max_length: int) -> Dataset:
    """Return packs of at most `max_length` tokens with columns input_ids, labels, seq_lengths and rows.

    Raises `ValueError` for an example longer than a pack.
    """
    packs: list[list[Example]] = []
    # (free tokens, index of the pack), sorted, so that a bisection finds the tightest fit in O(log packs)
    open_packs: list[tuple[int, int]] = []
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        length = len(example.input_ids)
        if length > max_length:
            raise ValueError(f"{example.where}: {length} tokens do not fit a pack of {max_length}")
        best = bisect_left(open_packs, (length, 0))  # the first with at least `length` free tokens
        if best == len(open_packs):  # none: open a new pack, which is then the one with the most space
            packs.append([])
            open_packs.append((max_length, len(packs) - 1))
        space, number = open_packs.pop(best)
        packs[number].append(example)
        if space > length:  # a full pack is closed
            insort(open_packs, (space - length, number))
    return _dataset(packs, has_lengths=True)


def unpacked(examples: Sequence[Example]) -> Dataset:
    """Return one row per example, with columns input_ids, labels and rows."""
    return _dataset([[example] for example in examples], has_lengths=False)


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a function from rows of `pack` or `unpacked` to one batch without padding and without a mask.

    The rows are concatenated to tensors of shape (1, tokens): input_ids, labels (-100 at each document's start) and
    position_ids, which restart at 0 in each document.  There is no attention mask: given one, attention
    implementations ignore the restarts.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # imports torch and the trainers

    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id or 0, padding_free=True)


def _dataset(packs: Sequence[Sequence[Example]], has_lengths: bool) -> Dataset:
    from datasets import Dataset, Features, List, Value

    columns = {
        "input_ids": [[token for example in pack for token in example.input_ids] for pack in packs],
        "labels": [[label for example in pack for label in example.labels] for pack in packs],
    }
    if has_lengths:
        columns["seq_lengths"] = [[len(example.input_ids) for example in pack] for pack in packs]
    features = Features({name: List(Value("int32")) for name in columns} | {"rows": List(Value("string"))})
    rows = [[str(example.where) for example in pack] for pack in packs]
    return Dataset.from_dict(columns | {"rows": rows}, features=features)
