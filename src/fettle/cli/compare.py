"""`fettle compare`: two models side by side."""

import argparse
from typing import Any

from fettle import terminal
from fettle.cli.arguments import add_device, add_dtype

HELP = "show two models side by side on your rows: quality, size, speed"


def add_arguments(command: argparse.ArgumentParser) -> None:
    for letter in ("A", "B"):
        command.add_argument(
            letter.lower(), metavar=letter, help="checkpoint folder, output of train, GGUF file or hub name"
        )
    command.add_argument("--data", required=True, help="rows in any form that train reads")
    command.add_argument("--samples", type=int, default=64, help="rows compared at most (default: 64)")
    command.add_argument(
        "--max-length", type=int, default=1024, help="tokens of a row that count (default: 1024)"
    )
    command.add_argument("--seed", type=int, default=0, help="chooses the rows (default: 0)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_device(command)
    add_dtype(command)


def run(options: dict[str, Any]) -> None:
    from fettle.evaluation.comparison import show
    from fettle.evaluation.side_by_side import compare

    as_json = options.pop("json")
    comparison = compare(**options)
    if as_json:
        terminal.give(comparison.as_json())
    else:
        show(comparison)
