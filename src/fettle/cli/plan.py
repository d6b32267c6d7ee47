"""`fettle plan`: memory and time before a run."""

import argparse
from typing import Any

from fettle.options import add_options, resolve
from fettle.runs.options import PlanOptions

HELP = "say beforehand what a run takes: memory, time, the longest context"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_options(command, PlanOptions)


def run(options: dict[str, Any]) -> None:
    chosen = resolve(PlanOptions, options, options.pop("config", None))
    from fettle.runs.defaults import require_sensible

    require_sensible(chosen)
    from fettle.runs.memory_plan import plan

    plan(chosen)
