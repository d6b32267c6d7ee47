"""Progress of a run: step, loss, tokens per second, memory, time left.

A Hugging Face trainer calls back when a step ended, a batch was evaluated or metrics were logged. `ProgressCallback`
reports each as an event. It also adds speed and memory to the trainer's log history, which is saved with each
checkpoint, so the report of a resumed run shows the whole curve.

Speed is tokens per second of training time over the last few steps, excluding evaluation and saving. The time
left includes them, as it is based on steps per second of wall-clock time.

    progress = report_progress(trainer, report)
    trainer.train()
    progress.history  # one point per logged step
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from fettle.events import Message, Report, Training
from fettle.planning.program import peak_memory_bytes


def report_progress(trainer: Trainer, report: Report) -> "ProgressCallback":
    """Replace the trainer's own progress display by a `ProgressCallback` and return it.

    Token counting (without padding) is switched on if it is off, so that speed can be reported.
    """
    if trainer.args.include_num_input_tokens_seen == "no":
        trainer.args.include_num_input_tokens_seen = "non_padding"
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    progress = ProgressCallback(report)
    trainer.add_callback(progress)
    return progress


# ---- logged data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What the trainer logged at one step; None for a value it did not log."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None  # the peak so far


def points(log_history: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return one Point per step of a trainer's `state.log_history` that has a loss or an evaluation loss."""
    by_step: dict[int, dict[str, Any]] = {}
    names = set(Point.__dataclass_fields__) - {"step"}
    for entry in log_history:
        if "loss" in entry or "eval_loss" in entry:
            figures = by_step.setdefault(entry["step"], {})
            figures.update({name: entry[name] for name in names & set(entry)})
    return [Point(step=step, **figures) for step, figures in sorted(by_step.items())]


@dataclass(slots=True)
class _Pace:
    """The speed of a run. Steps from before a resume do not count."""

    first_step: int
    first_tokens: int
    began: float = field(init=False)
    training_seconds: float = 0.0
    _mark: float = field(init=False)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self) -> None:
        self.began = self._mark = time.monotonic()
        self._recent.append((0.0, self.first_tokens))

    def step_ended(self, tokens: int) -> None:
        """Count the time since the last mark as training. tokens: the run's total so far."""
        now = time.monotonic()
        self.training_seconds += now - self._mark
        self._mark = now
        self._recent.append((self.training_seconds, tokens))

    def something_else_ended(self) -> None:
        """Do not count the time since the last mark: it was spent on evaluating or saving."""
        self._mark = time.monotonic()

    def tokens_per_second(self, *, recent: bool) -> float | None:
        """Return the speed over the last steps, or over all of them; None before the first step."""
        then, tokens_then = self._recent[0] if recent else (0.0, self.first_tokens)
        now, tokens_now = self._recent[-1]
        return (tokens_now - tokens_then) / (now - then) if now > then and tokens_now > tokens_then else None

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def seconds_left(self, step: int, total: int) -> float | None:
        done = step - self.first_step
        return self.seconds() / done * (total - step) if done > 0 else None


# ---- events ------------------------------------------------------------------------------------------------


class ProgressCallback(TrainerCallback):
    """Reports a trainer's progress, from the first process only, and keeps its metrics."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self._pace: _Pace | None = None
        self._log_history: list[dict[str, float]] = []
        self._device: torch.device | None = None
        self._batch: int | None = None  # of the evaluation that is running
        self._latest: dict[str, float] = {}  # loss and eval loss, as last logged

    @property
    def history(self) -> list[Point]:
        """The logged points, including those from before a resume."""
        return points(self._log_history)

    @property
    def tokens_per_second(self) -> float | None:
        """The speed over all training steps since the start or the last resume; None if unknown."""
        return self._pace.tokens_per_second(recent=False) if self._pace else None

    # The trainer's events, in the order in which they occur.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._device = args.device
        self._log_history = state.log_history
        self._pace = _Pace(first_step=state.global_step, first_tokens=state.num_input_tokens_seen)
        if state.global_step and state.is_world_process_zero:
            self.report(Message(f"resumed at step {state.global_step}/{state.max_steps}"))
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pace is not None:
            self._pace.step_ended(state.num_input_tokens_seen)
        self._report(state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        self._latest.update({name: logs[name] for name in ("loss", "eval_loss") if name in logs})
        if "loss" in logs and self._pace is not None:
            speed = self._pace.tokens_per_second(recent=True)
            measured = {"tokens_per_second": speed, "memory_bytes": peak_memory_bytes(self._device)}
            state.log_history[-1].update(
                {name: value for name, value in measured.items() if value is not None}
            )
            self._report(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self._batch = (self._batch or 0) + 1
        self._report(state, batches=len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch = None
        if self._pace is not None:
            self._pace.something_else_ended()
            self._report(state)

    on_predict = on_evaluate

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pace is not None:
            self._pace.something_else_ended()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._report(state, is_over=True)

    def _report(self, state: Any, *, batches: int = 0, is_over: bool = False) -> None:
        pace = self._pace
        if state.is_world_process_zero:
            step, steps = state.global_step, state.max_steps
            self.report(
                Training(
                    step=step,
                    steps=steps,
                    batch=self._batch,
                    batches=batches,
                    loss=self._latest.get("loss"),
                    eval_loss=self._latest.get("eval_loss"),
                    tokens_per_second=pace.tokens_per_second(recent=True) if pace else None,
                    peak_memory_bytes=peak_memory_bytes(self._device),
                    seconds=pace.seconds() if pace else 0.0,
                    seconds_left=pace.seconds_left(step, steps) if pace and not is_over else None,
                    is_over=is_over,
                )
            )
