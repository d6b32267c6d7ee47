"""Threads sleep while they wait, and there are no more of them than the machine grants."""

import os
import subprocess
import sys

import pytest

from fettle import threads
from fettle.threads import configure_threads


def settled(**given: str) -> dict[str, str]:
    environment = dict(given)
    configure_threads(environment)
    return environment


def test_threads_sleep_while_they_wait():
    assert settled()["OMP_WAIT_POLICY"] == "PASSIVE"


def test_few_compiled_products_are_kept():
    capacity = str(threads.PRIMITIVE_CACHE_ENTRIES)
    assert {settled()[f"{cache}_CAPACITY"] for cache in ("ONEDNN_PRIMITIVE_CACHE", "LRU_CACHE")} == {capacity}


def test_what_the_user_set_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    threads.QUOTA.write_text("100000 100000\n")
    given = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7", "LRU_CACHE_CAPACITY": "9"}
    assert settled(**given).items() >= given.items()


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("100000 100000", "1"), ("150000 100000", "2"), ("max 100000", None), ("9900000 100000", None)],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    threads.QUOTA.write_text(quota + "\n")
    assert settled().get("OMP_NUM_THREADS") == expected


def test_every_command_settles_them_before_pytorch_is_imported():
    """PyTorch's OpenMP library shows the policy it was loaded with."""
    program = "import sys; from fettle.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, "plan", "--model", "fettle-tiny", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_WAIT")}
    ended = subprocess.run(
        words, env=environment | {"OMP_DISPLAY_ENV": "TRUE"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in ended.stderr
