"""`fettle quickstart`: the main job on the embedded model."""

import argparse
from pathlib import Path
from typing import Any

HELP = "teach the embedded model a new skill and show the proof"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", default="quickstart", help="folder for the result (default: quickstart)")


def run(options: dict[str, Any]) -> None:
    from fettle.quickstart import quickstart

    quickstart(Path(options["output"]))
