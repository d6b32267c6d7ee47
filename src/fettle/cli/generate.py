"""`fettle generate`: complete one prompt, or every prompt of a file."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fettle import terminal
from fettle.cli.arguments import add_model, add_sampling, sampling
from fettle.errors import UserError

HELP = "complete one prompt, or every prompt of a file"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model(command)
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="the prompt; - reads it from standard input")
    prompts.add_argument("--prompts", help="a file whose rows have `prompt` or `messages`")
    command.add_argument("--output", help="the file for the answers to --prompts; an interrupted run resumes")
    command.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    command.add_argument("--raw", action="store_true", help="use the prompt as is, without the chat template")
    add_sampling(command, temperature=0.0)


def run(options: dict[str, Any]) -> None:
    from fettle.cli.open_engine import open_engine

    chosen = sampling(options)
    how = {name: options[name] for name in ("raw", "system")}
    if options["prompts"] is not None:
        _answer_file(options, chosen, how)
        return
    if options["output"] is not None:
        raise UserError("--output needs --prompts; the completion of a single --prompt is printed.")
    if options["overwrite"]:
        raise UserError("--overwrite needs --prompts and --output.")
    prompt = _prompt(options["prompt"])
    terminal.print_result(open_engine(options).generate([prompt], chosen, **how)[0])


def _answer_file(options: dict[str, Any], chosen: Any, how: dict[str, Any]) -> None:
    from fettle.cli.answer_file import AnswerFile, settings_of
    from fettle.cli.display import Display
    from fettle.cli.open_engine import open_engine

    if options["output"] is None:
        raise UserError("--prompts needs --output, the file for the answers.")
    settings = settings_of(options["model"], chosen, dtype=options["dtype"], **how)
    output = Path(options["output"])
    file = AnswerFile(Path(options["prompts"]), output, overwrite=options["overwrite"], settings=settings)
    engine = open_engine(options)
    with Display(progress=terminal.console(stderr=True)) as report:
        file.answer(engine, chosen, **how, report=report)
    terminal.print_result(str(output))


def _prompt(given: str) -> str:
    """The prompt as given; for -, standard input without its last line break."""
    try:
        prompt = sys.stdin.read().removesuffix("\n") if given == "-" else given
        prompt.encode()  # bytes that are not UTF-8 arrive as lone surrogates
    except UnicodeError as error:
        raise UserError("--prompt is not UTF-8 text.") from error
    return prompt
