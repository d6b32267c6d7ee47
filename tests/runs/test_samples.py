"""Sample answers on the terminal: short, whatever a model says."""

import io

from rich.console import Console

from fettle.cli.display import MAX_SHOWN_CHARACTERS, show_sample
from fettle.events import Sample


def shown(sample: Sample) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show_sample(sample, console)
    return console.file.getvalue().splitlines()


def test_an_answer_that_does_not_stop_is_cut_soon_after_the_length_of_the_right_one():
    lines = shown(Sample("Spell cat.", "c-a-t", "dog " * 60, "c-a-t"))
    assert lines[:2] == ["prompt    Spell cat.", "expected  c-a-t"]
    assert lines[2].startswith("before  ✗ dog dog") and lines[2].endswith("...") and len(lines[2]) <= 70
    assert lines[3] == "after   ✓ c-a-t"


def test_an_answer_as_long_as_the_right_one_is_whole():
    expected = "x" * (MAX_SHOWN_CHARACTERS - 20)
    assert shown(Sample("?", expected, expected, None))[2] == f"before  ✓ {expected}"


def test_nothing_is_longer_than_the_limit():
    lines = shown(Sample("p" * 999, "w" * 999, "a" * 999, "b" * 999))
    assert all(len(line) == 10 + MAX_SHOWN_CHARACTERS for line in lines[:4])
