"""The benchmarks' own arithmetic: what is compared, and what is refused."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compare

    yield compare
    for name in ("compare", "fresh", "contender", "shapes", "machine", "tables", "predictions"):
        sys.modules.pop(name, None)


def runs(compare, losses, seconds, *, contender="fettle", documents=1):
    setting = compare.Setting(name=contender, contender=contender, documents=documents)
    return compare.Runs(setting, [{"losses": losses, "seconds": seconds, "peak_bytes": 9_000}])


def test_no_time_is_told_when_losses_differ_or_are_no_numbers(compare):
    base = runs(compare, [11.0, 10.9], [1, 1], contender="trl")
    compare.check_losses([base, runs(compare, [11.01, 10.9], [1, 1])])
    for losses in ([11.0, 10.8], [11.0], [11.0, float("nan")]):
        with pytest.raises(SystemExit, match="losses differ"):
            compare.check_losses([base, runs(compare, losses, [1, 1])])


def test_first_steps_are_left_out_and_the_base_has_as_many_documents(compare):
    one = runs(compare, [1], [99, 4, 4], contender="trl")
    eight = runs(compare, [1], [99, 3, 3], contender="trl", documents=8)
    ours = runs(compare, [1], [99, 1.5, 1.5], documents=8)
    row = compare.row_of(ours, [one, eight, ours], compare.SETS["short"], {"floor_seconds": 0.75})
    assert row["times_as_fast"] == 2 and row["share_of_ceiling"] == 0.5


def test_a_budget_in_terms_of_the_base_is_its_first_peak(compare):
    base = runs(compare, [1], [1], contender="trl")
    assert compare.budget("trl/3", base) == "3000" and compare.budget("8GB", None) == "8GB"
    with pytest.raises(compare.fresh.Failed, match="needs trl"):
        compare.budget("trl", None)


def test_a_table_replaces_only_what_stands_between_its_markers(compare):
    import tables

    page = tables.between_markers("# Title\n", "phi", "old")
    assert tables.between_markers(page + "after\n", "phi", "new") == page.replace("old", "new") + "after\n"
