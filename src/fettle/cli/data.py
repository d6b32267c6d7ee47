"""`fettle data`: what fettle understands of a data file."""

import argparse
from typing import Any, get_args

from fettle import terminal
from fettle.errors import UserError
from fettle.runs.method_facts import METHOD_FACTS
from fettle.runs.options import TrainOn

HELP = "show what a data file trains on: counts, lengths, masks, doubtful rows, duplicates, overlaps"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="rows in any format that train accepts")
    command.add_argument(
        "--model", required=True, help="the model to train, for its tokenizer, chat template and context"
    )
    command.add_argument(
        "--max-length", type=int, help="maximum tokens per row (default: the model's context, at most 2048)"
    )
    command.add_argument(
        "--method", choices=list(METHOD_FACTS), default="sft", help="as in train (default: sft)"
    )
    command.add_argument(
        "--train-on",
        choices=get_args(TrainOn),
        default="assistant",
        help="compute the loss on the assistant's turns only, or on all tokens (default: assistant)",
    )
    command.add_argument("--chat-template", metavar="NAME", help="format of chats, as in train")
    command.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="count rows that cannot be trained on, instead of stopping",
    )
    command.add_argument(
        "--eval-data", metavar="FILE", help="held-out rows: those that the data contains are listed"
    )
    command.add_argument(
        "--benchmark",
        metavar="FILE",
        help="rows of a benchmark, in any columns: those that share 13 words in a row with the data are listed",
    )
    command.add_argument(
        "--rows", type=int, default=3, metavar="N", help="rows to show with their masks (default: 3)"
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")


def run(options: dict[str, Any]) -> None:
    from fettle.adapters.model_ref import resolve
    from fettle.cli.data_report import show_data
    from fettle.cli.display import displayed
    from fettle.data.inspect import inspect_data
    from fettle.runs.defaults import row_limit

    as_json, method = options.pop("json"), options.pop("method")
    facts = METHOD_FACTS[method]
    if options["train_on"] != "assistant" and "train_on" not in facts.options:
        raise UserError(f"--train-on belongs to --method sft, but the method is {method}; leave it out.")
    ref = resolve(options.pop("model"))
    stored = ref.stored_by_config()
    max_length = row_limit(options.pop("max_length"), stored.config.max_position_embeddings)
    report = displayed(inspect_data, progress_to_stderr=True)(
        options.pop("file"), ref.tokenizer_for(stored), max_length=max_length, kind=facts.rows, **options
    )
    if as_json:
        terminal.print_result(report.as_json())
    else:
        show_data(report)
