"""Score the embedded model on held-out lessons, skill by skill, and on the quickstart's orders."""

import json
from pathlib import Path
from typing import Any

from machine import circumstances

import fettle
from fettle.data.formats import to_row
from fettle.evaluation import answer, exact_share, questions
from fettle.tiny.lessons import SKILLS, lessons, orders

ROWS_A_SKILL = 100


def held_out() -> dict[str, list[dict[str, Any]]]:
    """ROWS_A_SKILL held-out rows of every skill, and of the orders the model never saw."""
    rows: dict[str, list[dict[str, Any]]] = {skill: [] for skill in SKILLS}
    for row in lessons(ROWS_A_SKILL * len(SKILLS) * 2, seed=2, split="held_out"):
        if len(rows[row["skill"]]) < ROWS_A_SKILL:
            rows[row["skill"]].append(row)
    return rows | {"orders": list(orders(ROWS_A_SKILL, seed=2, split="held_out"))}


def main() -> None:
    """Print and write the share of answers that are right to the letter."""
    model, tokenizer = fettle.load("fettle-tiny")
    shares = {}
    for skill, rows in held_out().items():
        asked = questions([to_row(row, skill) for row in rows], tokenizer)
        shares[skill] = round(exact_share(answer(model, tokenizer, asked)), 3)
        print(f"{skill:12} {shares[skill]:7.1%}", flush=True)
    taught = [share for skill, share in shares.items() if skill != "orders"]
    result = {"mean_of_skills": round(sum(taught) / len(taught), 4), "exact": shares} | circumstances()
    print(f"{'mean':12} {result['mean_of_skills']:7.1%}")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
