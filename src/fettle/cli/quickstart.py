"""`fettle quickstart`: fine-tune, export and compare the embedded model."""

import argparse
from pathlib import Path
from typing import Any

HELP = "teach the embedded model a new skill and show scores before and after"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", default="quickstart", help="output folder (default: quickstart)")


def run(options: dict[str, Any]) -> None:
    from fettle.cli.display import displayed
    from fettle.cli.results import show_outcome
    from fettle.quickstart import quickstart

    show_outcome(displayed(quickstart)(Path(options["output"])))
