"""`fettle train`: fine-tune a model."""

import argparse
from typing import Any

from fettle.cli.resumable import add_resume, run_options, start_or_resume
from fettle.options import add_options
from fettle.runs.options import TrainOptions

HELP = "fine-tune a model on your data with a LoRA adapter"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_options(command, TrainOptions)
    add_resume(command)


def run(options: dict[str, Any]) -> None:
    chosen = run_options(options, TrainOptions)
    from fettle.methods.finetune import dry_run, resume_training, train

    start_or_resume(options, chosen, train, resume_training, dry_run)
