"""The size of a training program that has not started yet is the smallest that was noted."""

from types import SimpleNamespace

import pytest

from fettle.planning import program


def test_a_process_that_holds_other_things_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program.program_bytes() == program.UNSEEN_BYTES
    for size in (600_000_000, 580_000_000, 4_000_000_000):
        memory = SimpleNamespace(rss=size)
        process = SimpleNamespace(memory_info=lambda memory=memory: memory)
        monkeypatch.setattr(program.psutil, "Process", lambda process=process: process)
        program.note_program()
    assert program.program_bytes() == 580_000_000
