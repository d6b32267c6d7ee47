"""The result of a finished run: its report, and a summary for the terminal."""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from fettle import terminal
from fettle.runs.measure import Measurement, samples, scores
from fettle.runs.options import LoopOptions
from fettle.runs.progress import Point
from fettle.runs.report import RunReport, Sample, is_correct, scores_table
from fettle.runs.resume import REPORT, RUN_FILE
from fettle.runs.rows import RunData

_PACKAGES = ("fettle-llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")
_SHOWN_SAMPLES = 3
MAX_SHOWN_CHARACTERS = 160
"""Maximum characters of a prompt or answer on the terminal. An answer is cut soon after the length of the expected one,
as a model that does not stop adds nothing useful. The report shows all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The output folder, the scores before and after, and the report."""

    output: Path
    before: Measurement
    after: Measurement
    report: RunReport


def describe(
    options: LoopOptions,
    *,
    model_name: str,
    method: str,
    data: RunData,
    history: Sequence[Point],
    tokens_per_second: float | None,
    seconds: float,
    peak_memory_bytes: int,
    before: Measurement,
    after: Measurement,
    next_commands: Sequence[str],
) -> RunReport:
    """Build a run's report."""
    output = Path(options.output)
    eval_curve = [(p.step, p.eval_loss) for p in history if p.eval_loss is not None]
    if "loss" in before.held_out:
        eval_curve.insert(0, (0, before.held_out["loss"]))
    return RunReport(
        title=f"{output.name}: {model_name}",
        model=model_name,
        method=method,
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes,
        tokens_per_second=tokens_per_second,
        scores=scores(before, after),
        samples=samples(before, after),
        loss_curve=[(p.step, p.loss) for p in history if p.loss is not None],
        eval_curve=eval_curve,
        learning_rate_curve=[(p.step, p.learning_rate) for p in history if p.learning_rate is not None],
        data_summary=data.summary.counts() + data.notes,
        example=[(segment.text, segment.is_trained) for segment in data.summary.example],
        files=[
            ("model", str(output)),
            ("options", str(output / RUN_FILE)),
            ("report", str(output / REPORT)),
        ],
        next_commands=next_commands,
        options={f.name: getattr(options, f.name) for f in dataclasses.fields(options)},
        versions={"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    )


def show(outcome: Outcome, console: Console | None = None) -> None:
    """Print a few answers, the before/after table, the files and the next commands."""
    report, console = outcome.report, console or terminal.console()
    console.print()
    show_samples(report.samples[:_SHOWN_SAMPLES], console)
    if report.scores:
        console.print(scores_table(report))
        console.print()
    for what, path in report.files:
        console.print(f"{what:8} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print("\nnext:")
    for command in report.next_commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def show_samples(shown: Sequence[Sample], console: Console) -> None:
    """Print prompts with the expected answer and the model's answers, shortened; missing ones are left out."""
    for sample in shown:
        longest = MAX_SHOWN_CHARACTERS if sample.expected is None else max(60, len(sample.expected) + 20)
        lines = [f"prompt    {_short(sample.prompt)}"]
        if sample.expected is not None:
            lines.append(f"expected  {_short(sample.expected)}")
        for name, answer in (("before", sample.before), ("after", sample.after)):
            if answer is not None:
                mark = {True: "✓", False: "✗", None: " "}[is_correct(sample, answer)]
                lines.append(f"{name:7} {mark} {_short(answer, longest)}")
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        console.print()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source folder, not installed
        return "not installed"


def _short(text: str, longest: int = MAX_SHOWN_CHARACTERS) -> str:
    text, longest = " ".join(text.split()), min(longest, MAX_SHOWN_CHARACTERS)
    return text if len(text) <= longest else text[: longest - 3] + "..."
