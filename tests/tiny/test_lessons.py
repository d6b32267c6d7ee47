"""The lessons: the same for everyone, never shared between splits, silent about what the quickstart teaches."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fettle.tiny import words
from fettle.tiny.lessons import SKILLS, Row, lessons, orders
from fettle.tiny.skills import SKILL_FUNCTIONS


def question(row: Row) -> str:
    """All that stands before the answer to score."""
    return json.dumps(row["messages"][:-1])


def test_same_seed_gives_the_same_rows_in_another_process(tmp_path: Path) -> None:
    # Another process has another hash seed: a set that decides an order would show here.
    output = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        "-m",
        "fettle.tiny.lessons",
        "--count",
        "50",
        "--seed",
        "3",
        "--output",
        str(output),
    ]
    subprocess.run(command, check=True)
    written = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert written == list(lessons(50, seed=3, split="train"))
    assert written != list(lessons(50, seed=4, split="train"))


def test_command_refuses_to_overwrite_in_one_sentence(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    output.write_text("mine")
    command = [sys.executable, "-m", "fettle.tiny.lessons", "--count", "5", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "rows.jsonl" in result.stderr
    assert output.read_text() == "mine"


@pytest.mark.parametrize("make", [lessons, orders])
def test_splits_share_no_question(make) -> None:
    held_out = {question(row) for row in make(1500, seed=1, split="held_out")}
    trained = {question(row) for row in make(20_000, seed=1, split="train")}
    assert len(held_out) > 1000
    assert not held_out & trained


def test_a_held_out_sum_is_held_out_in_every_wording() -> None:
    def asked(split) -> set[tuple[str, ...]]:
        rows = lessons(40_000 if split == "train" else 2_000, seed=0, split=split)
        questions = [row["messages"][-2]["content"] for row in rows if row["skill"] == "arithmetic"]
        sums = [text for text in questions if "+" in text or "Add" in text or "plus" in text]
        return {
            tuple(filter(str.isdigit, "".join(c if c.isdigit() else " " for c in s).split())) for s in sums
        }

    assert asked("held_out") and not asked("held_out") & asked("train")


def test_every_skill_is_taught_and_named() -> None:
    rows = list(lessons(2000, seed=0, split="train"))
    assert {row["skill"] for row in rows} == set(SKILLS)
    assert 12 <= len(SKILLS) <= 20


def test_conversations_are_well_formed() -> None:
    for row in [*lessons(3000, seed=2, split="train"), *orders(200, seed=2, split="train")]:
        roles = [message["role"] for message in row["messages"]]
        without_system = roles[1:] if roles[0] == "system" else roles
        assert without_system == ["user", "assistant"] * (len(without_system) // 2), row
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"]), row


def test_lessons_hold_no_json_and_no_orders() -> None:
    for row in lessons(5000, seed=5, split="train"):
        for message in row["messages"]:
            assert "Order" not in message["content"] and '{"' not in message["content"]


def test_an_order_holds_what_its_json_says() -> None:
    for row in orders(300, seed=1, split="held_out"):
        sentence, answer = (message["content"] for message in row["messages"])
        fields = json.loads(answer)
        assert list(fields) == ["name", "item", "colour", "count", "payment"]
        assert all(str(value) in sentence for value in fields.values())


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("box", "boxes"),
        ("berry", "berries"),
        ("key", "keys"),
        ("mouse", "mice"),
        ("brush", "brushes"),
        ("cup", "cups"),
    ],
)
def test_plural(noun: str, expected: str) -> None:
    assert words.plural(noun) == expected


def test_answers_are_right() -> None:
    rng = random.Random(0)
    for _ in range(300):
        messages = SKILL_FUNCTIONS["sort"](rng).messages
        numbers = [int(part) for part in messages[0]["content"].partition(": ")[2].split(", ")]
        if "Sort" in messages[0]["content"]:
            assert [int(part) for part in messages[1]["content"].split(", ")] == sorted(numbers)
        messages = SKILL_FUNCTIONS["story"](rng).messages
        if (start := messages[0]["content"].find("Who has the ")) >= 0:
            noun = messages[0]["content"][start + len("Who has the ") : -1]
            owner = next(part for part in messages[0]["content"].split(". ") if part.endswith(" " + noun))
            assert owner.startswith(messages[1]["content"] + " has ")
    assert all(words.OPPOSITES[words.OPPOSITES[word]] == word for word in words.OPPOSITES)
