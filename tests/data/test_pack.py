"""Packs lose nothing, fill well, and tell the model where each document begins."""

import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fettle.data import Example, collator, pack, unpacked


def example(length: int, start: int = 0) -> Example:
    ids = list(range(start, start + length))
    return Example(ids, [-100, *ids[1:]], f"document of {length}")


def documents(count: int, longest: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    return [example(draw.randint(1, longest), start=1000 * number) for number in range(count)]


def split_up(row: dict) -> list[tuple[list[int], list[int]]]:
    found, position = [], 0
    for length in row["seq_lengths"]:
        stretch = slice(position, position + length)
        found.append((row["input_ids"][stretch], row["labels"][stretch]))
        position += length
    assert position == len(row["input_ids"]) == len(row["labels"])
    return found


def test_packs_hold_every_document_once_and_whole():
    examples = documents(200, longest=64)
    packs = pack(examples, max_length=64)
    found = [document for row in packs for document in split_up(row)]
    assert sorted(found) == sorted((e.input_ids, e.labels) for e in examples)
    assert max(len(row["input_ids"]) for row in packs) <= 64
    assert sum(map(len, packs["input_ids"])) / (64 * len(packs)) > 0.95


def test_a_document_goes_where_it_fits_best():
    packs = pack([example(n) for n in (3, 7, 5, 2, 6)], max_length=10)
    assert packs["seq_lengths"] == [[7, 3], [6, 2], [5]]


def test_the_same_documents_give_the_same_packs():
    examples = documents(100, longest=64)
    assert pack(examples, max_length=64).to_dict() == pack(examples, max_length=64).to_dict()


def test_a_document_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="document of 11"):
        pack([example(11)], max_length=10)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_batch_has_positions_that_restart_and_no_mask(base: PreTrainedTokenizerFast, is_packed):
    examples = [example(7), example(3, start=10), example(5, start=20)]
    dataset = pack(examples, max_length=10) if is_packed else unpacked(examples)
    batch = collator(base)([dataset[index] for index in range(len(dataset))])
    expected = [*range(7), 10, 11, 12, *range(20, 25)]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["position_ids"].tolist() == [[*range(7), *range(3), *range(5)]]
    assert "attention_mask" not in batch
    assert torch.equal(batch["labels"] == -100, batch["position_ids"] == 0)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
