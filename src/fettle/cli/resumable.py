"""Shared by `fettle train` and `fettle pretrain`: read the options, start, try or resume a run."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fettle import terminal
from fettle.errors import UserError
from fettle.options import resolve


def add_resume(command: argparse.ArgumentParser) -> None:
    """Add --resume and --dry-run."""
    command.add_argument(
        "--dry-run",
        action="store_true",
        default=argparse.SUPPRESS,
        help="read the data, plan, load the model and take a few steps on the largest batch; write nothing",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="resume the interrupted run in --output with its original options",
    )


def run_options(options: dict[str, Any], kind: Any) -> Any:
    """A new run's options, validated before heavy imports; None if a run is to be resumed."""
    is_resumed, config = options.pop("resume"), options.pop("config", None)
    if is_resumed and not options:
        raise UserError("--resume needs --output, the folder of the run to resume.")
    if is_resumed and (config is not None or set(options) != {"output"}):
        raise UserError("--resume accepts only --output: the run continues with its original options.")
    if is_resumed:
        return None
    chosen = resolve(kind, options, config)
    from fettle.runs.defaults import require_valid

    require_valid(chosen)
    return chosen


def start_or_resume(
    typed: dict[str, Any],
    options: Any,
    start: Callable[..., Any],
    resume: Callable[..., Any],
    dry_run: Callable[..., Any],
) -> None:
    """Start a run, or resume one if `options` is None, and print the outcome; or only try it."""
    from fettle.cli.display import displayed
    from fettle.cli.results import show_outcome

    if "dry_run" in typed:
        displayed(dry_run)(options)
        return
    start, resume = displayed(start), displayed(resume)
    outcome = resume(Path(typed["output"])) if options is None else start(options)
    if outcome is None:
        terminal.print_message(f"the run in {typed['output']} has already finished", file=sys.stdout)
    else:
        show_outcome(outcome)
