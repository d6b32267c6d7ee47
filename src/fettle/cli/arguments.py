"""Options that several commands share."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fettle.engine.request import Sampling


def add_model(command: argparse.ArgumentParser) -> None:
    """Add --model, --system, --device and --dtype."""
    command.add_argument(
        "--model",
        required=True,
        help="checkpoint folder, train output, GGUF file, hub name, or fettle-tiny",
    )
    command.add_argument("--system", help="system message before the prompt")
    add_device(command)
    add_dtype(command)


def add_device(command: argparse.ArgumentParser) -> None:
    """Add --device."""
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="device to run on (default: cuda if available)"
    )


def add_dtype(command: argparse.ArgumentParser) -> None:
    """Add --dtype."""
    choices = ["auto", "float32", "bfloat16", "float16"]
    command.add_argument(
        "--dtype", choices=choices, default="auto", help="dtype of the weights (auto: as stored)"
    )


def add_sampling(command: argparse.ArgumentParser, *, temperature: float) -> None:
    """Add the sampling options. temperature: the default."""
    command.add_argument(
        "--max-new-tokens",
        type=int,
        help="maximum tokens to generate (default: 512, or what fits in the context)",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"sampling temperature; 0 is greedy decoding (default: {temperature})",
    )
    for name, kind, default, text in _FILTERS:
        command.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    command.add_argument("--seed", type=int, help="random seed, for reproducible sampling")


_FILTERS: tuple[tuple[str, type, float, str], ...] = (
    ("top-k", int, 0, "sample from this many most likely tokens; 0 is off"),
    ("top-p", float, 1.0, "sample from the most likely tokens up to this total probability"),
    ("min-p", float, 0.0, "leave out tokens less likely than this share of the most likely one"),
    ("repetition-penalty", float, 1.0, "divide the logits of tokens that have occurred; 1 is off"),
    ("presence-penalty", float, 0.0, "subtract this from the logits of tokens in the answer"),
    ("frequency-penalty", float, 0.0, "subtract this for each time that a token is in the answer"),
)


def sampling(options: dict[str, Any]) -> "Sampling":
    """The parsed options of `add_sampling`. Raises UserError for invalid values."""
    from fettle.engine.request import Sampling

    filters = [name.replace("-", "_") for name, *_ in _FILTERS]
    names = ("max_new_tokens", "temperature", *filters, "seed")
    return Sampling(**{name: options[name] for name in names})
