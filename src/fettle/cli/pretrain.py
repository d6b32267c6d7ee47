"""`fettle pretrain`: train a new model from scratch."""

import argparse
from typing import Any

from fettle.cli.resumable import add_resume, run_options, start_or_resume
from fettle.options import add_options
from fettle.runs.options import PretrainOptions

HELP = "train a new small model from scratch, as the embedded one was"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_options(command, PretrainOptions)
    add_resume(command)


def run(options: dict[str, Any]) -> None:
    chosen = run_options(options, PretrainOptions)
    from fettle.methods.pretrain import dry_run, pretrain, resume_pretraining

    start_or_resume(options, chosen, pretrain, resume_pretraining, dry_run)
