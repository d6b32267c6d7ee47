"""What a job reports while it runs. An event is plain data: `json.dumps(dataclasses.asdict(event))` accepts it.

A job takes `report` and calls it with each event. A face decides what becomes of them: the command line draws bars and
tables (cli/display.py), `list.append` keeps them, a web page can stream them. What a job makes, it returns.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

MIN_SECONDS = 0.1
"""Between two reports of the same task's progress, which may advance with every token."""


@dataclass(frozen=True, slots=True)
class Message:
    """Text for the user. about: the run, or the machine it runs on."""

    text: str
    about: Literal["run", "machine"] = "run"


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What the data became, in lines."""

    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """The memory plan: its figures, as `fettle plan --json` prints them, and in lines what they mean for the run."""

    title: str
    figures: dict[str, Any]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out prompt, the expected answer (None if unknown) and the model's answers."""

    prompt: str
    expected: str | None
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a task is done: `share`, 0 to 1, and in words. is_over: the task's last event."""

    task: str
    share: float
    done: str
    seconds: float
    seconds_left: float | None = None
    is_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run after each step, and after each batch of an evaluation.

    batch: None between evaluations; batches: 0 if their number is unknown. seconds: since the start or the last resume.
    """

    step: int
    steps: int
    batch: int | None
    batches: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    peak_memory_bytes: int
    seconds: float
    seconds_left: float | None
    is_over: bool


Event = Message | DataSummary | Planned | Sample | ResultTable | Progress | Training
Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Report to nobody."""


@contextmanager
def progress(
    task: str, report: Report, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Report a task's progress and time left.

    Yields a function to call with the share that is done, 0 to 1, and optionally with what is done in words.
    """
    began = last = clock()
    report(Progress(task, 0.0, "0%", 0.0))

    def advance(share: float, done: str | None = None) -> None:
        nonlocal last
        now = clock()
        if now - last >= MIN_SECONDS:
            last, seconds = now, now - began
            left = seconds / share * (1 - share) if share > 0 else None
            report(Progress(task, share, done or f"{share:.0%}", seconds, left))

    yield advance
    report(Progress(task, 1.0, "100%", clock() - began, 0.0, is_over=True))
