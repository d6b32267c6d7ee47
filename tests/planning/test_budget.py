"""Amounts of memory as users write them, and what the device has."""

import psutil
import pytest
import torch

from fettle.errors import UserError
from fettle.planning import budget
from fettle.planning.budget import free_bytes, parse_bytes


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
    with pytest.raises(UserError, match=r"^memory is"):
        parse_bytes(text)


def test_a_cpu_offers_less_than_the_machine_has() -> None:
    assert 0 < free_bytes(torch.device("cpu")) < psutil.virtual_memory().total


@pytest.mark.parametrize("text", ["8", "0.5", "16384"])
def test_a_bare_number_that_small_is_taken_for_a_slip(text: str) -> None:
    with pytest.raises(UserError, match=rf"^memory {text} means {text} bytes; for gigabytes write {text}GB"):
        parse_bytes(text)


V1, V2 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), ("max", "current", "inactive_file")


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Makes a control group with a limit, what is used of it, and the page cache within that."""
    monkeypatch.setattr(budget, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(budget, "OWN_CGROUPS", tmp_path / "own")

    def make(own, path, names, limit, used, cache=0) -> None:
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own").write_text(own)
        for name, value in zip(names, (limit, used), strict=False):
            (folder / f"memory.{name}").write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\nactive_file 7\n")

    return make


def free() -> float:
    """What the group leaves: the budget without the share kept back and this process's own memory."""
    return free_bytes(torch.device("cpu")) / budget.SHARE - psutil.Process().memory_info().rss


GROUPS = [
    ("0::/\n", "", V2),
    ("0::/a/b\n", "a/b", V2),
    ("0::/a/b/c\n", "a", V2),  # around the process's own
    ("0::/elsewhere\n", "", V2),  # as from within a container, whose group is the outermost it sees
    ("5:cpu:/\n4:memory:/\n", "memory", V1),
    ("4:memory:/a/b\n0::/\n", "memory/a/b", V1),
    ("4:memory:/elsewhere\n", "memory", V1),
]


@pytest.mark.parametrize(("own", "path", "names"), GROUPS, ids=str)
def test_a_containers_limit_counts(own, path, names, group) -> None:
    whole = free()
    group(own, path, names, 50_000_000, 30_000_000)
    assert free() == pytest.approx(20_000_000, abs=5_000_000)
    for no_limit in ("max", 9223372036854771712):
        group(own, path, names, no_limit, 30_000_000)
        assert free() == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize(("own", "path", "names"), GROUPS, ids=str)
def test_page_cache_that_can_be_taken_back_is_free(own, path, names, group) -> None:
    group(own, path, names, 500_000_000, 490_000_000, cache=400_000_000)
    assert free() == pytest.approx(410_000_000, abs=5_000_000)
