"""Shows what a job returned in the terminal: the outcome of a run, and a comparison of two models."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from fettle import terminal
from fettle.cli.display import print_lines, show_sample
from fettle.evaluation.comparison import Comparison, Side
from fettle.files import human_bytes
from fettle.runs.outcome import Outcome
from fettle.runs.report import Score, score_change, score_text, verdict

_SHOWN_SAMPLES = 3


def show_outcome(outcome: Outcome) -> None:
    """Print a few answers, the before/after table, the files and the next commands."""
    report, console = outcome.report, terminal.console()
    console.print()
    for sample in report.samples[:_SHOWN_SAMPLES]:
        show_sample(sample, console)
    if report.scores:
        console.print(scores_table(report.scores))
        console.print()
    print_lines([f"{what:8} {path}" for what, path in report.files], console)
    print_lines(["\nnext:", *(f"  {command}" for command in report.next_commands)], console)


def scores_table(scores: Sequence[Score]) -> Table:
    """Return the scores before and after."""
    table = _table("score", "before", "after", "change")
    styles = {"better": "bold green", "worse": "bold red", "same": ""}
    for score in scores:
        change = Text(score_change(score), styles[verdict(score)])
        # Text, not str, so that a name with [brackets] is not read as markup
        name, before, after = Text(score.name), score_text(score, "before"), score_text(score, "after")
        table.add_row(name, Text(before), Text(after), change)
    return table


def show_comparison(comparison: Comparison) -> None:
    """Print the two models side by side, the distances between them, and what was left out."""
    console, a, b = terminal.console(), comparison.a, comparison.b
    print_lines(
        [f"{letter}  {side.name}  ({side.runtime})" for letter, side in (("A", a), ("B", b))], console
    )
    table = _table(f"{comparison.rows} rows", "A", "B")
    for name, left, right in _figures(a, b):
        table.add_row(name, Text(left), Text(right))
    console.print(table)
    table = _table("A vs. B", "")
    for name, figure in _distances(comparison):
        table.add_row(name, Text(figure))
    console.print()
    console.print(table)
    print_lines(comparison.notes, console)


def _figures(a: Side, b: Side) -> list[tuple[str, str, str]]:
    rows = [
        ("perplexity", f"{a.perplexity:,.4f}", f"{b.perplexity:,.4f}"),
        ("tokens scored", f"{a.tokens:,}", f"{b.tokens:,}"),
        ("exact match", _share(a.exact_share), _share(b.exact_share)),
        ("size on disk", human_bytes(a.size_bytes), human_bytes(b.size_bytes)),
    ]
    for name in ("prompt", "generated"):
        left, right = (_rate(getattr(side, f"{name}_tokens_per_second")) for side in (a, b))
        rows.append((f"{name} tokens per second", left, right))
    return rows


def _distances(comparison: Comparison) -> list[tuple[str, str]]:
    kl, before = comparison.kl, comparison.tokens_before_difference
    where = f" ({comparison.kl_tokens:,} tokens)" if kl is not None else ""
    return [
        (f"KL(A || B) per token{where}", "–" if kl is None else f"{kl:.2e} nats"),
        ("top-1 agreement", _share(comparison.top_agreement, digits=2)),
        (f"identical answers ({comparison.answers} prompts)", _share(comparison.equal_answers)),
        ("mean tokens before the first difference", "–" if before is None else f"{before:.1f}"),
    ]


def _table(*columns: str) -> Table:
    table = Table(columns[0], box=None, pad_edge=False, header_style="dim")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _share(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{share:.{digits}%}"
