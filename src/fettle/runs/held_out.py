"""Decisions from the held-out losses of a run: which checkpoint is the best.

They are made from the trainer's log alone, which every checkpoint contains, so that a resumed run decides the same.
"""

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from fettle.runs.resume import is_complete


def best_checkpoint(checkpoints: Path, state: TrainerState) -> tuple[Path, float] | None:
    """Return the complete checkpoint with the lowest held-out loss, the first if there are several, and that loss."""
    for step, loss in sorted(_losses(state), key=lambda each: each[1]):
        if is_complete(folder := checkpoints / f"checkpoint-{step}"):
            return folder, loss
    return None


class SaveBest(TrainerCallback):
    """Saves a checkpoint whenever the held-out loss is the lowest so far. The trainer, whose `metric_for_best_model` is
    that loss, does not delete it."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        *before, (_, loss) = _losses(state)
        if loss < min((each for _, each in before), default=math.inf):
            control.should_save = True


def _losses(state: TrainerState) -> list[tuple[int, float]]:
    """Return the step and the loss of each evaluation, in order."""
    return [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
