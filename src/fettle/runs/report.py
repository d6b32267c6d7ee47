"""The run report: one HTML file with the model, the data, the training curves and the scores before and after.

The file is self-contained: CSS and charts (SVG) are inline, it runs no scripts and loads nothing, so it can be
mailed, archived with the run and opened years later. Rows and answers may contain any text, including HTML: the
template escapes all of it, and a content security policy blocks whatever might slip through.

`RunReport` is plain data; this module computes the charts and formats the values, `report.html.jinja` is the page.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from fettle.events import Sample
from fettle.files import human_bytes, write_aside

Curve = Sequence[tuple[int, float]]  # (step, value)


class Score(NamedTuple):
    """A metric before and after training; None if it was not measured.

    unit: "%" for a fraction from 0 to 1, shown in per cent; any other unit is appended to the number.
    """

    name: str
    before: float | None
    after: float | None
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"


@dataclass(slots=True, kw_only=True)
class RunReport:
    """Everything the page shows. Empty parts are omitted."""

    title: str
    model: str
    method: str
    when: str
    seconds: float
    peak_memory_bytes: int
    tokens_per_second: float | None = None
    scores: Sequence[Score] = ()
    samples: Sequence[Sample] = ()
    loss_curve: Curve = ()
    eval_curve: Curve = ()
    learning_rate_curve: Curve = ()
    data_summary: Sequence[str] = ()
    example: Sequence[tuple[str, bool]] = ()  # pieces of one training row: (text, is trained on)
    files: Sequence[tuple[str, str]] = ()  # (what it is, path)
    next_commands: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def write_report(report: RunReport, path: Path) -> None:
    """Write `report` as one HTML file to `path`, atomically."""
    template = _environment().from_string(
        resources.files("fettle.runs").joinpath("report.html.jinja").read_text("utf-8")
    )
    charts = [
        line_chart("Loss", {"training": report.loss_curve, "held-out": report.eval_curve}),
        line_chart("Learning rate", {"learning rate": report.learning_rate_curve}),
    ]
    html = template.render(report=report, charts=[chart for chart in charts if chart is not None])
    with write_aside(Path(path), replace=True) as aside:
        aside.write_text(html, encoding="utf-8", errors="replace")  # a lone surrogate has no UTF-8


# ---- formatting -------------------------------------------------------------------------------------------------


def score_text(score: Score, when: Literal["before", "after"]) -> str:
    """Return the score as text with its unit: 93.4%, 1.234 nats; a dash if it was not measured."""
    value = score.before if when == "before" else score.after
    return "–" if value is None else _with_unit(value, score.unit)


def score_change(score: Score) -> str:
    """Return after minus before as signed text; fractions in percentage points."""
    if score.before is None or score.after is None:
        return "–"
    change = score.after - score.before
    return _with_unit(change, " points" if score.unit == "%" else score.unit, sign="+")


def verdict(score: Score) -> Literal["better", "worse", "same"]:
    """Whether the score after is better or worse than before, judged by the digits shown."""
    if (
        score.before is None
        or score.after is None
        or score_text(score, "before") == score_text(score, "after")
    ):
        return "same"
    return "better" if (score.after > score.before) == (score.better == "higher") else "worse"


def is_correct(sample: Sample, answer: str | None) -> bool | None:
    """Whether `answer` is an exact match of the expected one, ignoring surrounding white space; None if unknown."""
    if sample.expected is None or answer is None:
        return None
    return answer.strip() == sample.expected.strip()


def _with_unit(value: float, unit: str, sign: str = "") -> str:
    if unit in ("%", " points"):
        return f"{100 * value:{sign}.1f}{unit}"
    shown = f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.4g}"
    return f"{shown} {unit}".rstrip()


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=human_bytes, clock=_clock, option=_option_text, figure=_figure)
    environment.globals.update(
        score_text=score_text, score_change=score_change, verdict=verdict, is_correct=is_correct
    )
    return environment


# ---- charts ------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 720, 260  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 64, 704, 12, 226  # of the plot inside it
MAX_MARKS = 300  # longer curves are thinned: a screen cannot show more points
SMOOTH_MIN_POINTS = 30  # a curve of at least this many points gets a smoothed one on top


class Mark(NamedTuple):
    """A point of a curve on the page, with its tooltip."""

    x: float
    y: float
    title: str


@dataclass(slots=True, kw_only=True)
class ChartLine:
    """A curve on the page: its marks, and the `points` of its polylines."""

    name: str
    marks: list[Mark]
    path: str
    smooth_path: str | None


@dataclass(slots=True, kw_only=True)
class Chart:
    """Everything the template needs to draw a chart; ticks are (position, label)."""

    title: str
    lines: list[ChartLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    left_out: int  # points that are NaN or infinite


def line_chart(title: str, curves: dict[str, Curve]) -> Chart | None:
    """Return the geometry of `curves` on common axes; None if no curve has a finite point."""
    finite = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    steps = [x for curve in finite.values() for x, _ in curve]
    values = [y for curve in finite.values() for _, y in curve]
    if not steps:
        return None
    x_ticks = ticks(min(steps), max(steps), 8, is_whole=True)
    y_ticks = ticks(min(values), max(values), 5)
    x_high = max(
        max(steps), x_ticks[1]
    )  # the curve reaches the right edge, even if that is not a round number
    scale = _Scale((x_ticks[0], x_high), (y_ticks[0], y_ticks[-1]))
    return Chart(
        title=title,
        lines=[_line(name, curve, scale) for name, curve in finite.items() if curve],
        x_ticks=[(scale.x(value), _figure(value)) for value in x_ticks if value <= x_high],
        y_ticks=[(scale.y(value), _figure(value)) for value in y_ticks],
        left_out=sum(map(len, curves.values())) - len(steps),
    )


def ticks(low: float, high: float, most: int, *, is_whole: bool = False) -> list[float]:
    """Return about `most` round values that enclose low..high, spaced by 1, 2 or 5 times a power of ten."""
    if high <= low:
        pad = 1.0 if is_whole else abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if is_whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


class _Scale:
    """Maps (step, value) onto the plot; y grows downwards there."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        (self.x_low, x_high), (self.y_low, y_high) = x_range, y_range
        self.x_unit = (RIGHT - LEFT) / (x_high - self.x_low or 1)
        self.y_unit = (BOTTOM - TOP) / (y_high - self.y_low or 1)

    def x(self, step: float) -> float:
        return round(LEFT + (step - self.x_low) * self.x_unit, 1)

    def y(self, value: float) -> float:
        return round(BOTTOM - (value - self.y_low) * self.y_unit, 1)


def _line(name: str, curve: Curve, scale: _Scale) -> ChartLine:
    marks = [Mark(scale.x(x), scale.y(y), f"step {x:,}: {name} {_figure(y)}") for x, y in _thin(curve)]
    smooth = None
    if len(curve) >= SMOOTH_MIN_POINTS and name == "training":
        smooth = _polyline((scale.x(x), scale.y(y)) for x, y in _thin(_smooth(curve)))
    path = _polyline((mark.x, mark.y) for mark in marks)
    return ChartLine(name=name, marks=marks, path=path, smooth_path=smooth)


def _thin(curve: Curve) -> Curve:
    """Return the lowest and highest point of each short segment, and the ends, so that no spike is lost."""
    if len(curve) <= MAX_MARKS:
        return curve
    length = math.ceil(2 * len(curve) / MAX_MARKS)
    kept = {0, len(curve) - 1}
    for start in range(0, len(curve), length):
        stretch = range(start, min(start + length, len(curve)))
        kept |= {min(stretch, key=lambda i: curve[i][1]), max(stretch, key=lambda i: curve[i][1])}
    return [curve[i] for i in sorted(kept)]


def _smooth(curve: Curve) -> Curve:
    """Return the centred moving average, which does not lag behind the curve."""
    reach = len(curve) // 30
    sums = [0.0, *accumulate(y for _, y in curve)]
    smooth = []
    for i, (x, _) in enumerate(curve):
        near = min(reach, i, len(curve) - 1 - i)
        smooth.append((x, (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)))
    return smooth


def _polyline(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _figure(value: float, digits: int = 4) -> str:
    """Format a number for reading: 1,200, 0.35, 2e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        factor, power = f"{value:.{digits - 1}e}".split("e")
        return f"{float(factor):g}e{int(power)}"
    return f"{value:.{digits}g}"
