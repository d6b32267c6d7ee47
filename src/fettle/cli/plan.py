"""`fettle plan`: predict a run's memory and time."""

import argparse
import json
from typing import Any

from fettle import terminal
from fettle.events import Event, Planned
from fettle.options import add_options, resolve
from fettle.runs.options import PlanOptions

HELP = "predict a run's memory, time per step and longest context before it starts"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_options(command, PlanOptions)


def run(options: dict[str, Any]) -> None:
    chosen = resolve(PlanOptions, options, options.pop("config", None))
    from fettle.runs.defaults import require_valid

    require_valid(chosen)
    from fettle.cli.display import Display
    from fettle.runs.memory_plan import plan

    display = Display()

    def report(event: Event) -> None:
        if chosen.json and isinstance(event, Planned):
            terminal.print_result(json.dumps(event.figures, indent=2))
        else:
            display(event)

    plan(chosen, report)
