"""`fettle COMMAND ...`: parse, run, and report errors as one line and an exit code."""

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
from fettle.cli import chat, compare, data, export, generate, plan, pretrain, quickstart, train
from fettle.errors import Interrupted, ProofError, UserError, shortage
from fettle.options import Parser, flag
from fettle.threads import configure_threads
from fettle.version import __version__

COMMANDS = (quickstart, data, train, plan, generate, chat, compare, export, pretrain)
INTERRUPTED = 130
"""The exit code after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for an error the user can fix, 1 for other errors, or 130 after Ctrl-C."""
    options = vars(_parser().parse_args(arguments))
    quiet_libraries()
    configure_threads()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # do not fail on a character that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    command: Callable[[dict[str, Any]], None] = options.pop("run")
    try:
        with _terminable():
            command(options)
    except UserError as error:
        return _report(f"error: {error.worded(flag)}", 2)
    except ProofError as error:
        return _report(f"error: {error}", 1)
    except Interrupted as stop:
        return _report(f"interrupted. Resume with:\n  {stop}", INTERRUPTED)
    except KeyboardInterrupt:
        return _report("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # closed at exit; nothing is left to flush into the pipe
        return 1
    except Exception as error:
        if (message := shortage(error)) is None:
            raise
        return _report(f"error: {message}", 2)
    return 0


def _report(line: str, code: int) -> int:
    terminal.print_message(f"fettle: {line}")
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C within the block: no half-written file remains, and a run prints how to resume it."""
    if threading.current_thread() is not threading.main_thread():
        # only the main thread can set signal handlers
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
    """Turn off telemetry, progress bars and advice of the libraries that fettle uses."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it if it is installed
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
        description = f"{module.HELP[0].upper()}{module.HELP[1:]}."
        command = commands.add_parser(name, help=module.HELP, description=description)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
