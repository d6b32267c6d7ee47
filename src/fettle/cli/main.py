"""`fettle COMMAND ...`: parse, run, and turn errors into one line and an exit code."""

import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fettle import terminal
from fettle.cli import chat, compare, export, generate, plan, pretrain, quickstart, train
from fettle.errors import Interrupted, ProofError, UserError, shortage
from fettle.options import Parser
from fettle.threads import settle_threads
from fettle.version import __version__

COMMANDS = (quickstart, train, plan, generate, chat, compare, export, pretrain)
INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for what the user can mend, 1 for the rest, 130 after Ctrl-C."""
    options = vars(_parser().parse_args(arguments))
    quiet_libraries()
    settle_threads()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a character that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    command: Callable[[dict[str, Any]], None] = options.pop("run")
    try:
        with _terminable():
            command(options)
    except (UserError, ProofError) as error:
        return _tell(f"error: {error}", 2 if isinstance(error, UserError) else 1)
    except Interrupted as stop:
        return _tell(f"interrupted. Go on with:\n  {stop}", INTERRUPTED)
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # closed at exit; nothing left to flush into the pipe
        return 1
    except Exception as error:
        if (lack := shortage(error)) is None:
            raise
        return _tell(f"error: {lack}", 2)
    return 0


def _tell(line: str, code: int) -> int:
    terminal.say(f"fettle: {line}")
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: nothing half-written stays, and a run says how to go on."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may listen
        yield
        return

    def end(*given: Any) -> None:
        listener = signal.getsignal(signal.SIGINT)
        (listener if callable(listener) else signal.default_int_handler)(*given)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """No usage pings, no progress bars and no advice from the libraries underneath."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which PEFT imports where it is installed
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|peft|trl|transformers|accelerate)\b.*"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="fettle", description="Fine-tune small language models, with proof that they got better."
    )
    parser.add_argument("--version", action="version", version=f"fettle {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
