"""The result of a finished run, and its report."""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fettle.runs.measure import Measurement, samples, scores
from fettle.runs.options import LoopOptions
from fettle.runs.progress import Point
from fettle.runs.report import RunReport
from fettle.runs.resume import REPORT, RUN_FILE
from fettle.runs.rows import RunData

_PACKAGES = ("fettle-llm", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source folder, not installed
        return "not installed"
