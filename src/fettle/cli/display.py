"""Shows a job's events in the terminal: text, tables, and progress as a bar or as lines some seconds apart."""

import functools
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fettle import terminal
from fettle.events import DataSummary, Event, Message, Planned, Progress, ResultTable, Sample, Training
from fettle.files import human_bytes
from fettle.runs.report import is_correct

Result = TypeVar("Result")

MAX_SHOWN_CHARACTERS = 160
"""Maximum characters of a prompt or answer on the terminal. An answer is cut soon after the length of the expected one,
as a model that does not stop adds nothing useful. The report shows all of it."""


def displayed(job: Callable[..., Result], *, progress_to_stderr: bool = False) -> Callable[..., Result]:
    """Return the job with its events shown in the terminal, unless the caller passes `report`."""

    @functools.wraps(job)
    def run(*args: Any, **kwargs: Any) -> Result:
        if "report" in kwargs:
            return job(*args, **kwargs)
        with Display(progress=terminal.console(stderr=True) if progress_to_stderr else None) as report:
            return job(*args, report=report, **kwargs)

    return run


class Display:
    """Shows events on `out`, by default standard output, and progress on `progress`, by default the same console.

    Progress is a bar on a terminal, and elsewhere lines at least `line_seconds` apart. As a context manager it restores
    the terminal however the job ends.
    """

    def __init__(self, out: Console | None = None, progress: Console | None = None) -> None:
        self.out = out or terminal.console()
        self.progress = progress or self.out
        self.line_seconds = 5.0
        self._live: Live | None = None
        self._latest: Progress | Training | None = None
        self._arrived = self._last_line = 0.0  # by the clock; in the task's seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        """Show the event."""
        match event:
            case Message(text, "machine"):
                terminal.print_message(text)
            case Message(text):
                print_lines([text], self.out)
            case DataSummary(lines):
                self.out.print("data", style="bold")
                print_lines(lines, self.out)
            case Planned():
                _show_plan(event, self.out)
            case Sample():
                show_sample(event, self.out)
            case ResultTable():
                _show_table(event, self.out)
            case _:
                self._show_progress(event)

    def _show_progress(self, event: Progress | Training) -> None:
        before, self._latest, self._arrived = self._latest, event, time.monotonic()
        if not self.progress.is_terminal or self.progress.is_dumb_terminal:
            if line := self._line(event, before):
                self._last_line = event.seconds
                print_lines([line], self.progress)
            return
        if self._live is None:
            self._live = Live(console=self.progress, get_renderable=self._picture, refresh_per_second=4)
            self._live.start()
        if event.is_over:
            self._stop()

    def _stop(self) -> None:
        """Leave the last state of the bar on the screen and restore the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, event: Progress | Training, before: Progress | Training | None) -> str | None:
        """The line to print for the event, if any: of a task its name, then its progress unless it is quick; of a run
        the first and the last step, the end of an evaluation, and any step after `line_seconds`."""
        if type(before) is not type(event) or before is None or before.is_over:
            self._last_line = 0.0 if isinstance(event, Progress) else float("-inf")
            return event.task if isinstance(event, Progress) else None
        is_due = event.seconds - self._last_line >= self.line_seconds
        if isinstance(event, Progress):
            is_due = self._last_line > 0 if event.is_over else is_due
            line = f"{event.task}: {_task_figures(event)}"
        elif event.batch is not None:
            line = f"evaluating {event.batch}/{event.batches or '?'}"
        else:
            is_due |= event.is_over or (isinstance(before, Training) and before.batch is not None)
            done = ["done"] if event.is_over else []
            line = "  ".join([f"step {event.step}/{event.steps}", *_figures(event), *done])
        return line if is_due else None

    def _picture(self) -> Table | Group:
        """The bar and, under that of a training run, its figures. The time goes on between two events."""
        event = self._latest
        assert event is not None
        since = 0.0 if event.is_over else time.monotonic() - self._arrived
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        if isinstance(event, Progress):
            bar.add_row(Text(event.task), ProgressBar(1.0, event.share), _task_figures(event, since))
            return bar
        phase, done, total = "training", event.step, event.steps
        if event.batch is not None:
            phase, done, total = "evaluating", event.batch, event.batches
        share = ProgressBar(total or None, done, complete_style="cyan")
        bar.add_row(Text(phase, "bold"), share, f"{done}/{total or '?'}")
        return Group(bar, Text("  ".join(_figures(event, since)), "dim", no_wrap=True, overflow="ellipsis"))


def print_lines(lines: Sequence[str], console: Console) -> None:
    """Print the lines as they are, each unbroken."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_sample(sample: Sample, console: Console) -> None:
    """Print a prompt with the expected answer and the model's answers, shortened; missing ones are left out."""
    longest = MAX_SHOWN_CHARACTERS if sample.expected is None else max(60, len(sample.expected) + 20)
    lines = [f"prompt    {_short(sample.prompt)}"]
    if sample.expected is not None:
        lines.append(f"expected  {_short(sample.expected)}")
    for name, answer in (("before", sample.before), ("after", sample.after)):
        if answer is not None:
            mark = {True: "✓", False: "✗", None: " "}[is_correct(sample, answer)]
            lines.append(f"{name:7} {mark} {_short(answer, longest)}")
    print_lines([*lines, ""], console)


def _show_plan(plan: Planned, console: Console) -> None:
    console.print(plan.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2))
    table.add_column("part")
    table.add_column("", justify="right")
    for name, size in plan.figures["memory_bytes"].items():
        table.add_row(name, human_bytes(size))
    table.add_section()
    peak, budget = (human_bytes(plan.figures[name]) for name in ("peak_bytes", "budget_bytes"))
    table.add_row("peak", f"{peak} of {budget}", style="bold")
    console.print(table)
    print_lines(plan.lines, console)


def _show_table(event: ResultTable, console: Console) -> None:
    table = Table(title=event.title, title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for number, column in enumerate(event.columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in event.rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _task_figures(event: Progress, since: float = 0.0) -> str:
    if event.is_over:
        return f"took {_clock(event.seconds)}"
    left = event.seconds_left
    return event.done if left is None else f"{event.done}, {_clock(max(0.0, left - since))} left"


def _figures(event: Training, since: float = 0.0) -> list[str]:
    """The run's figures, each with its unit. since: the seconds since the event."""
    losses = {"loss": event.loss, "eval loss": event.eval_loss}
    speed, left = event.tokens_per_second, event.seconds_left
    return [
        *(f"{name} {value:.4f}" for name, value in losses.items() if value is not None),
        *([f"{speed:,.0f} tokens/s"] if speed else []),
        f"{human_bytes(event.peak_memory_bytes)} peak memory",
        f"{_clock(event.seconds + since)} elapsed",
        *([f"{_clock(max(0.0, left - since))} left"] if left is not None else []),
    ]


def _clock(seconds: float) -> str:
    """Return hours, minutes and seconds, as 0:01:23."""
    return str(timedelta(seconds=round(seconds)))


def _short(text: str, longest: int = MAX_SHOWN_CHARACTERS) -> str:
    text, longest = " ".join(text.split()), min(longest, MAX_SHOWN_CHARACTERS)
    return text if len(text) <= longest else text[: longest - 3] + "..."
