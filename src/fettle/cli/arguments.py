"""Options that several commands share."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fettle.engine.decode import Sampling


def add_model(command: argparse.ArgumentParser) -> None:
    """The model and what it is asked with."""
    command.add_argument(
        "--model",
        required=True,
        help="checkpoint folder, output of train, GGUF file, hub name, or fettle-tiny",
    )
    command.add_argument("--system", help="a system turn before the prompt")
    add_device(command)
    add_dtype(command)


def add_device(command: argparse.ArgumentParser) -> None:
    """Where to compute."""
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to compute (default: cuda where there is one)"
    )


def add_dtype(command: argparse.ArgumentParser) -> None:
    """The type of the weights."""
    choices = ["auto", "float32", "bfloat16", "float16"]
    command.add_argument(
        "--dtype", choices=choices, default="auto", help="type of the weights (auto: as stored)"
    )


def add_sampling(command: argparse.ArgumentParser, *, temperature: float) -> None:
    """How the next token is chosen. temperature: the default."""
    command.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: 512, or what the context has room for)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0: the likeliest words (default: {temperature})",
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this share"
    )
    command.add_argument("--seed", type=int, help="makes sampling repeatable")


def sampling(options: dict[str, Any]) -> "Sampling":
    """What `add_sampling` has parsed. Raises UserError for values that are none."""
    from fettle.engine.decode import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return Sampling(**{name: options[name] for name in names})
