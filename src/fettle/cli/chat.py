"""`fettle chat`: a conversation with a model."""

import argparse
from typing import Any

from fettle.cli.arguments import add_model, add_sampling, sampling

HELP = "chat with a model in the terminal"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_model(command)
    add_sampling(command, temperature=0.7)


def run(options: dict[str, Any]) -> None:
    from fettle.cli.conversation import chat
    from fettle.engine.load import load
    from fettle.engine.text import Engine

    chosen = sampling(options)
    model, tokenizer = load(options["model"], dtype=options["dtype"], device=options["device"])
    chat(Engine(model, tokenizer), chosen, system=options["system"])
