"""Held-out rows were never seen in training."""

import pytest

from fettle.data import Row, split_held_out


def rows(count: int, distinct: int | None = None) -> list[Row]:
    return [Row(f"a.txt, line {i}", "text", text=f"text {i % (distinct or count)}") for i in range(count)]


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (9, 0), (10, 1), (20, 2), (1000, 100)])
def test_the_fraction_is_held_out(count, held_out):
    train, test = split_held_out(rows(count), fraction=0.1, seed=0)
    assert len(test) == held_out
    assert sorted(row.where for row in train + test) == sorted(row.where for row in rows(count))


def test_twenty_rows_give_at_least_one():
    assert len(split_held_out(rows(20), fraction=0.001, seed=0)[1]) == 1
    assert len(split_held_out(rows(20), fraction=0.0, seed=0)[1]) == 0


def test_the_same_seed_gives_the_same_split_and_another_another():
    assert split_held_out(rows(50), 0.2, seed=1) == split_held_out(rows(50), 0.2, seed=1)
    assert split_held_out(rows(50), 0.2, seed=1) != split_held_out(rows(50), 0.2, seed=2)


def test_identical_rows_stay_on_one_side():
    train, test = split_held_out(rows(100, distinct=30), fraction=0.2, seed=0)
    assert 0 < len(test) <= 20
    assert not {row.text for row in train} & {row.text for row in test}
    assert split_held_out(rows(30, distinct=1), fraction=0.2, seed=0)[1] == []
