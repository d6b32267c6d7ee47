"""Progress of a run: step, loss, tokens per second, memory, time left.

A Hugging Face trainer reports events to callbacks: a step ended, a batch was evaluated, metrics were logged.
`ProgressCallback` shows them as a live progress bar on a terminal, and as plain lines a few seconds apart
elsewhere (a file, a CI log). It also adds speed and memory to the trainer's log history, which is saved with
each checkpoint, so the report of a resumed run shows the whole curve.

Speed is tokens per second of training time over the last few steps, excluding evaluation and saving. The time
left includes them, as it is based on steps per second of wall-clock time.

    with show_progress(trainer) as progress:
        trainer.train()
    progress.history  # one point per logged step
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from fettle import terminal
from fettle.files import human_bytes
from fettle.planning.program import peak_memory_bytes


def show_progress(trainer: Trainer, console: Console | None = None) -> "ProgressCallback":
    """Replace the trainer's own progress display by a `ProgressCallback` and return it.

    Token counting (without padding) is switched on if it is off, so that speed can be shown.
    """
    if trainer.args.include_num_input_tokens_seen == "no":
        trainer.args.include_num_input_tokens_seen = "non_padding"
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    progress = ProgressCallback(console)
    trainer.add_callback(progress)
    return progress


@contextmanager
def task_progress(
    what: str, console: Console, *, line_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[float], None]]:
    """Show a task's progress and time left: a bar on a terminal, elsewhere lines at least `line_seconds` apart.

    Yields a function to call with the fraction that is done, 0 to 1.
    """
    is_drawn = console.is_terminal and not console.is_dumb_terminal
    began = last_line = clock()
    if not is_drawn:
        console.print(what, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=console, disable=not is_drawn) as bar:
        task = bar.add_task(what, total=1.0, figures="")

        def advance(share: float) -> None:
            nonlocal last_line
            now = clock()
            figures = f"{share:.0%}"
            if share > 0:
                figures += f", {_clock((now - began) / share * (1 - share))} left"
            bar.update(task, completed=share, figures=figures)
            if not is_drawn and now - last_line >= line_seconds:
                console.print(f"{what}: {figures}", highlight=False, soft_wrap=True)
                last_line = now

        yield advance
        bar.update(task, completed=1.0, figures=f"took {_clock(clock() - began)}")
    if last_line > began:
        console.print(f"{what}: took {_clock(clock() - began)}", highlight=False, soft_wrap=True)


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


# ---- display -----------------------------------------------------------------------------------------


class ProgressCallback(TrainerCallback):
    """Shows a trainer's progress on `console` (standard error by default) and keeps its metrics.

    Use it as a context manager around `trainer.train()`: an interrupted trainer does not notify its callbacks,
    but the terminal must be restored. line_seconds: the minimum time between two plain lines.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = 5.0) -> None:
        self.console = console or terminal.console(stderr=True)
        self.line_seconds = line_seconds
        self._live: Live | None = None
        self._pace: _Pace | None = None
        self._log_history: list[dict[str, float]] = []
        self._device: torch.device | None = None
        self._phase, self._done, self._total = "training", 0, 0
        self._step, self._steps = 0, 0
        self._tokens = 0
        self._latest: dict[str, float] = {}  # loss and eval loss, as last logged
        self._last_line = float("-inf")
        self._is_training = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last state of the bar on the screen and restore the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

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
        self._is_training = True
        self._follow(state)
        self._pace = _Pace(first_step=state.global_step, first_tokens=self._tokens)
        self._show_phase("training", state.global_step, state.max_steps, state)
        if state.global_step and self._live is None:
            self._print_line(state, f"resumed at step {state.global_step}/{state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._follow(state)
        if self._pace is not None:
            self._pace.step_ended(self._tokens)
        self._show_phase("training", state.global_step, state.max_steps, state)
        self._print_line_if_due(state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        self._latest.update({name: logs[name] for name in ("loss", "eval_loss") if name in logs})
        self._follow(state)
        if "loss" in logs and self._pace is not None:
            speed = self._pace.tokens_per_second(recent=True)
            measured = {"tokens_per_second": speed, "memory_bytes": peak_memory_bytes(self._device)}
            state.log_history[-1].update(
                {name: value for name, value in measured.items() if value is not None}
            )
            self._print_line_if_due(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        done = self._done + 1 if self._phase == "evaluating" else 1
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else 0
        self._show_phase("evaluating", done, total, state)
        self._print_line_if_due(state, f"evaluating {done}/{total or '?'}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        self._leave_evaluation(state)
        if self._live is None and "eval_loss" in (metrics or {}):
            self._print_line(state, self._line())

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_evaluation(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._pace is not None:
            self._pace.something_else_ended()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_training = False
        self._follow(state)
        if self._live is None:
            self._print_line(state, f"{self._line()}  done")
        self.close()

    # Their display.

    def _follow(self, state: Any) -> None:
        """Take step, tokens and history from the trainer's state."""
        self._log_history = state.log_history
        self._step, self._steps = state.global_step, state.max_steps
        self._tokens = state.num_input_tokens_seen

    def _show_phase(self, phase: str, done: int, total: int, state: Any) -> None:
        self._phase, self._done, self._total = phase, done, total
        is_drawable = self.console.is_terminal and not self.console.is_dumb_terminal
        if self._live is None and is_drawable and state.is_world_process_zero:
            self._live = Live(console=self.console, get_renderable=self._picture, refresh_per_second=4)
            self._live.start()

    def _leave_evaluation(self, state: Any) -> None:
        if self._pace is not None:
            self._pace.something_else_ended()
        if self._is_training:
            self._show_phase("training", state.global_step, state.max_steps, state)
        else:
            self.close()
            self._phase = "training"

    def _figures(self) -> list[str]:
        """The current metrics, each with its unit."""
        speed = self._pace.tokens_per_second(recent=True) if self._pace else None
        left = self._pace.seconds_left(self._step, self._steps) if self._pace and self._is_training else None
        return [
            *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self._latest.items()),
            *([f"{speed:,.0f} tokens/s"] if speed else []),
            f"{human_bytes(peak_memory_bytes(self._device))} peak memory",
            *([f"{_clock(self._pace.seconds())} elapsed"] if self._pace else []),
            *([f"{_clock(left)} left"] if left is not None else []),
        ]

    def _line(self) -> str:
        step = [f"step {self._step}/{self._steps}"] if self._steps else []
        return "  ".join([*step, *self._figures()])

    def _print_line_if_due(self, state: Any, line: str | None = None) -> None:
        if self._live is None and time.monotonic() - self._last_line >= self.line_seconds:
            self._print_line(state, line or self._line())

    def _print_line(self, state: Any, line: str) -> None:
        if state.is_world_process_zero:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._last_line = time.monotonic()

    def _picture(self) -> Group:
        """The bar and, under it, the metrics."""
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        progress = ProgressBar(total=self._total or None, completed=self._done, complete_style="cyan")
        bar.add_row(Text(self._phase, "bold"), progress, f"{self._done}/{self._total or '?'}")
        return Group(bar, Text("  ".join(self._figures()), "dim", no_wrap=True, overflow="ellipsis"))


def _clock(seconds: float) -> str:
    """Return hours, minutes and seconds, as 0:01:23."""
    return str(timedelta(seconds=round(seconds)))
