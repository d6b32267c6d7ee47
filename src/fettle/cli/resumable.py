"""What `fettle train` and `fettle pretrain` share: options from a file or the line, a new run or a resumed one."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fettle import terminal
from fettle.errors import UserError
from fettle.options import resolve


def add_resume(command: argparse.ArgumentParser) -> None:
    """Add --resume."""
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output, with its own options",
    )


def run_options(options: dict[str, Any], kind: Any) -> Any:
    """A run's options, found sensible before the libraries are imported; None where one is to be resumed."""
    is_resumed, config = options.pop("resume"), options.pop("config", None)
    if is_resumed and not options:
        raise UserError("--resume needs --output: the folder of the run to go on with.")
    if is_resumed and (config is not None or set(options) != {"output"}):
        raise UserError(
            "--resume takes --output alone: the run goes on with the options it was started with."
        )
    if is_resumed:
        return None
    chosen = resolve(kind, options, config)
    from fettle.runs.defaults import require_sensible

    require_sensible(chosen)
    return chosen


def start_or_resume(
    typed: dict[str, Any], options: Any, start: Callable[..., Any], resume: Callable[..., Any]
) -> None:
    """Start a run, or go on with one where there are no options, and print how it ended."""
    from fettle.runs.outcome import show

    outcome = resume(Path(typed["output"])) if options is None else start(options)
    if outcome is None:
        terminal.say(f"the run in {typed['output']} has come to its end already", file=sys.stdout)
    else:
        show(outcome)
