"""Batches of rows of different lengths have about as many tokens each."""

from collections.abc import Sequence
from random import Random

import pytest

from fettle.data.batches import BalancedSampler, balanced_batches


def lengths_of(rows: int) -> list[int]:
    random = Random(3)
    return [int(20 + random.paretovariate(1.5) * 80) for _ in range(rows)]


def tokens(batches: list[list[int]], lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[row] for row in batch) for batch in batches]


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 4), (7, 2), (96, 4), (97, 8)])
def test_every_row_is_in_one_batch_and_batches_are_full(rows: int, size: int) -> None:
    batches = balanced_batches(lengths_of(rows), size, seed=0, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches) == -(-rows // size)


def test_the_largest_batch_is_far_smaller_than_one_drawn_at_random() -> None:
    lengths, random = lengths_of(400), Random(1)
    drawn = list(range(400))
    random.shuffle(drawn)
    at_random = [drawn[n : n + 4] for n in range(0, 400, 4)]
    balanced = balanced_batches(lengths, 4, seed=0, epoch=0)
    longest, mean = max(lengths), sum(lengths) / 100
    assert max(tokens(balanced, lengths)) <= max(1.15 * mean, longest + 3 * min(lengths) * 1.6)
    assert max(tokens(balanced, lengths)) < max(tokens(at_random, lengths))


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    lengths = lengths_of(60)
    first = balanced_batches(lengths, 4, seed=1, epoch=0)
    assert balanced_batches(lengths, 4, seed=1, epoch=0) == first
    others = [balanced_batches(lengths, 4, seed=seed, epoch=epoch) for seed, epoch in ((1, 1), (2, 0))]
    partners = [{frozenset(batch) for batch in each} for each in (first, *others)]
    assert len(partners[0] & partners[1]) < 8 and len(partners[0] & partners[2]) < 8
    sampler = BalancedSampler(lengths, 4, 1, lambda: 0)
    assert list(sampler) == [row for batch in first for row in batch] and len(sampler) == 60
