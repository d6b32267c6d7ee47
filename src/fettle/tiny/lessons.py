"""Training data of the embedded model: any number of rows, the same on every machine for the same seed.

A row is `{"skill": ..., "messages": [...]}`. The splits "train" and "held_out" never share a question: the hash
of a lesson's subject (its skill and key) decides its split, whatever its wording. Some rows start with a system
turn, some continue an earlier exchange.

    python -m fettle.tiny.lessons --count 1000 --seed 1 --split train --output lessons.jsonl
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Literal

from fettle.errors import UserError
from fettle.files import write_aside
from fettle.tiny.orders import order
from fettle.tiny.skills import SKILL_FUNCTIONS, Lesson, Message

Split = Literal["train", "held_out"]
Row = dict[str, Any]

SKILLS = tuple(SKILL_FUNCTIONS)
DRAW: dict[str, Callable[[Random], Lesson]] = {**SKILL_FUNCTIONS, "orders": order}
HELD_OUT_SHARE = 0.05
SYSTEM_TURNS = (
    "You are a helpful assistant.",
    "You are a patient teacher.",
    "Answer with as few words as you can.",
)


def split_of(skill: str, key: str) -> Split:
    """The split of a lesson, by the hash of its skill and key."""
    digest = hashlib.blake2b(f"{skill}:{key}".encode(), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32 else "train"


def draw(skill: str, split: Split, rng: Random) -> list[Message]:
    """The messages of the next lesson of a skill in a split."""
    while True:
        lesson = DRAW[skill](rng)
        if split_of(skill, lesson.key) == split:
            return lesson.messages


def lessons(count: int, *, seed: int, split: Split) -> Iterator[Row]:
    """Rows of all skills with equal probability; a row's skill is that of its last answer."""
    rng = Random(f"lessons {split} {seed}")
    for _ in range(count):
        skill = rng.choice(SKILLS)
        messages = draw(skill, split, rng)
        if messages[0]["role"] != "system":
            messages = with_opening(messages, split, rng)
        yield {"skill": skill, "messages": messages}


def with_opening(messages: list[Message], split: Split, rng: Random) -> list[Message]:
    """The messages; one time in ten preceded by an exchange of another skill, one in ten by a system turn."""
    if rng.random() < 0.1:
        earlier = draw(rng.choice(SKILLS), split, rng)
        # A skill's own system turn ("Answer in capital letters.") would not fit the following messages.
        messages = [turn for turn in earlier if earlier[0]["role"] != "system"] + messages
    if rng.random() < 0.1:
        messages = [{"role": "system", "content": rng.choice(SYSTEM_TURNS)}, *messages]
    return messages


def orders(count: int, *, seed: int, split: Split) -> Iterator[Row]:
    """Rows of the skill that is not among the lessons: an order as one sentence, answered as JSON."""
    rng = Random(f"orders {split} {seed}")
    for _ in range(count):
        yield {"skill": "orders", "messages": draw("orders", split, rng)}


def main() -> None:
    """Write rows to a JSON Lines file."""
    parser = argparse.ArgumentParser(description="Write lessons for the embedded model as JSON lines.")
    parser.add_argument("--count", type=int, required=True, help="number of rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "held_out"), default="train")
    parser.add_argument("--skill", choices=("lessons", "orders"), default="lessons")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    make = orders if options.skill == "orders" else lessons
    rows = make(options.count, seed=options.seed, split=options.split)
    try:
        with write_aside(options.output) as partial:
            write_rows(rows, partial)
    except UserError as error:
        parser.error(str(error))


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a file, one line of JSON each."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
