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
    from fettle.cli.open_engine import open_engine

    chosen = sampling(options)
    chat(open_engine(options), chosen, system=options["system"])
