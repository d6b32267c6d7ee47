"""`fettle generate`: complete one prompt."""

import argparse
import sys
from typing import Any

from fettle import terminal
from fettle.cli.arguments import add_model, add_sampling, sampling
from fettle.errors import UserError

HELP = "complete one prompt and print only the completion"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model(command)
    command.add_argument("--prompt", required=True, help="the prompt; - reads it from standard input")
    command.add_argument("--raw", action="store_true", help="use the prompt as is, without the chat template")
    add_sampling(command, temperature=0.0)


def run(options: dict[str, Any]) -> None:
    from fettle.engine.load import load
    from fettle.engine.text import generate

    chosen = sampling(options)
    prompt = _prompt(options["prompt"])
    model, tokenizer = load(options["model"], dtype=options["dtype"], device=options["device"])
    terminal.print_result(
        generate(model, tokenizer, prompt, raw=options["raw"], system=options["system"], sampling=chosen)
    )


def _prompt(given: str) -> str:
    """The prompt as given; for -, standard input without its last line break."""
    try:
        prompt = sys.stdin.read().removesuffix("\n") if given == "-" else given
        prompt.encode()  # bytes that are not UTF-8 arrive as lone surrogates
    except UnicodeError as error:
        raise UserError("--prompt is not UTF-8 text.") from error
    return prompt
