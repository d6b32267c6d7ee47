"""`fettle compare`: two models side by side."""

import argparse
from typing import Any

from fettle import terminal
from fettle.cli.arguments import add_device, add_dtype

HELP = "compare two models on your rows: quality, size, speed"


def add_arguments(command: argparse.ArgumentParser) -> None:
    for letter in ("A", "B"):
        command.add_argument(
            letter.lower(), metavar=letter, help="checkpoint folder, train output, GGUF file or hub name"
        )
    command.add_argument("--data", required=True, help="rows in any format that train accepts")
    command.add_argument("--samples", type=int, default=64, help="maximum number of rows (default: 64)")
    command.add_argument(
        "--max-length", type=int, default=1024, help="maximum tokens per row (default: 1024)"
    )
    command.add_argument("--seed", type=int, default=0, help="random seed for choosing the rows (default: 0)")
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    add_device(command)
    add_dtype(command)


def run(options: dict[str, Any]) -> None:
    from fettle.cli.display import displayed
    from fettle.cli.results import show_comparison
    from fettle.evaluation.side_by_side import compare

    as_json = options.pop("json")
    comparison = displayed(compare, progress_to_stderr=True)(**options)
    if as_json:
        terminal.print_result(comparison.as_json())
    else:
        show_comparison(comparison)
