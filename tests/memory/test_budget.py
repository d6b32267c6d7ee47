"""Amounts of memory as users write them, and what the device has."""

import psutil
import pytest
import torch

from fettle.errors import UserError
from fettle.memory import budget
from fettle.memory.budget import free_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GB", 16 * 10**9),
        ("16gib", 16 * 2**30),
        ("7.5 GiB", int(7.5 * 2**30)),
        ("8g", 8 * 10**9),
        (" 500 MB ", 500 * 10**6),
        ("2Ti", 2 * 2**40),
        ("64k", 64_000),
        ("1234567", 1234567),
        ("12b", 12),
        (".5GB", 500_000_000),
    ],
)
def test_amounts_are_read_in_either_unit(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0GB", "0.5b", "16 G B", "16GBs", "1e9", "GB", "nan"])
def test_anything_else_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(UserError, match="--budget is"):
        parse_bytes(text, "--budget")


def test_a_cpu_offers_less_than_the_machine_has() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < psutil.virtual_memory().total


@pytest.mark.parametrize("text", ["8", "0.5", "16384"])
def test_a_bare_number_that_small_is_taken_for_a_slip(text: str) -> None:
    with pytest.raises(UserError, match=f"--memory {text} means {text} bytes; for gigabytes write {text}GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_a_containers_limit_counts(limit, used, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(budget, "CGROUPS", tmp_path)
    whole = free_bytes(torch.device("cpu"))
    (tmp_path / "memory").mkdir()
    (tmp_path / used).write_text("30000000\n")
    (tmp_path / limit).write_text("50000000\n")
    own = psutil.Process().memory_info().rss
    assert free_bytes(torch.device("cpu")) == pytest.approx(budget.SHARE * (20_000_000 + own), rel=0.05)
    for no_limit in ("max\n", "9223372036854771712\n"):
        (tmp_path / limit).write_text(no_limit)
        assert free_bytes(torch.device("cpu")) == pytest.approx(whole, rel=0.2)
