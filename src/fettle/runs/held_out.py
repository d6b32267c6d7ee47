"""Decisions from the held-out losses of a run: whether to stop early, and which checkpoint is the best.

They are made from the trainer's log alone, which every checkpoint contains, so that a resumed run decides the same.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from fettle.runs.resume import is_complete


def evaluations_since_best(state: TrainerState) -> int:
    """Return how many evaluations came after the first with the lowest held-out loss; 0 before any evaluation."""
    losses = [loss for _, loss in _evaluations(state)]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def best_checkpoint(checkpoints: Path, state: TrainerState) -> tuple[Path, float] | None:
    """Return the complete checkpoint with the lowest held-out loss, the first if there are several, and that loss."""
    for step, loss in sorted(_evaluations(state), key=lambda each: each[1]):
        if is_complete(folder := checkpoints / f"checkpoint-{step}"):
            return folder, loss
    return None


class WatchHeldOut(TrainerCallback):
    """Saves a checkpoint whenever the held-out loss is the lowest so far; the trainer, whose `metric_for_best_model` is
    that loss, does not delete it. Stops the run once the loss has not fallen for `patience` evaluations."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if evaluations_since_best(state) == 0:
            control.should_save = True
        if self.has_stopped(state):
            control.should_save = control.should_training_stop = True

    def has_stopped(self, state: TrainerState) -> bool:
        """Whether the run ends here, before its last step."""
        return self.patience is not None and evaluations_since_best(state) >= self.patience


def _evaluations(state: TrainerState) -> list[tuple[int, float]]:
    """Return the step and the loss of each evaluation, in order."""
    return [(entry["step"], entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
