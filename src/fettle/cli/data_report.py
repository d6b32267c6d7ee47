"""Shows in the terminal what `fettle data` found."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fettle import terminal
from fettle.cli.display import print_lines
from fettle.data.inspect import Bin, DataReport, Overlaps
from fettle.data.summary import marked, shortened

BAR = 40
"""Characters of the longest bar."""
SHOWN_GROUPS = 5
SHOWN_PER_GROUP = 6
SHOWN_PASSAGE = 100


def show_data(report: DataReport) -> None:
    """Print the report, one part after the other; colour is used only in a terminal that has it."""
    console = terminal.console()
    _show_part("data", report.summary.counts(), console)
    _show_part("tokens per row", _lengths(report), console)
    _show_rows(report, console)
    for finding in report.findings:
        _show_part(
            f"{finding.what} ({finding.rows:,})", [f"{where}: {why}" for where, why in finding.worst], console
        )
    _show_part("identical rows", _groups(report.duplicates), console)
    _show_part("nearly identical rows", _groups(report.near_duplicates), console)
    for name, overlaps in (("held-out rows", report.held_out), ("benchmark", report.benchmark)):
        if overlaps is not None:
            _show_part(f"overlap with the {name}", _overlaps(overlaps), console)


def _show_part(title: str, lines: Sequence[str], console: Console) -> None:
    console.print(title, style="bold", soft_wrap=True)
    print_lines([*(f"  {line}" for line in lines), ""], console)


def _lengths(report: DataReport) -> list[str]:
    names = {50: "median", 100: "longest"}
    figures = (f"{names.get(share, f'{share}%')} {tokens:,}" for share, tokens in report.percentiles.items())
    return [*_bars(report.histogram, report.summary.max_length), ", ".join(figures)]


def _bars(bins: Sequence[Bin], max_length: int) -> list[str]:
    """Return a line per bin, and a border before the rows that are longer than the maximum length."""
    most = max((each.rows for each in bins), default=1)
    ranges = [f"{each.start:,} to {each.end - 1:,}" for each in bins]
    width = max(map(len, ranges), default=0)
    lines = []
    for each, tokens in zip(bins, ranges, strict=True):
        if each.start == max_length + 1:
            lines.append(f"{'':-<{width}} maximum length {max_length:,}: longer rows are cut or split")
        bar = "█" * round(BAR * each.rows / most) or ("▏" if each.rows else "")
        lines.append(f"{tokens:>{width}} {bar} {each.rows:,}".rstrip())
    return lines


def _show_rows(report: DataReport, console: Console) -> None:
    if not report.shown:
        return
    in_colour = console.color_system is not None and not console.no_color
    legend = "trained text in green, the rest dim" if in_colour else "trained text between ⟦ and ⟧"
    console.print(
        f"{_counted(len(report.shown), 'row')} with the mask: {legend}", style="bold", soft_wrap=True
    )
    for row in report.shown:
        print_lines([f"  {row.where}"], console)
        if in_colour:
            styles: dict[bool, Any] = {True: "bold green", False: "dim"}
            text = Text.assemble(*((shortened(each.text), styles[each.is_trained]) for each in row.segments))
        else:
            text = Text("".join(map(marked, row.segments)))
        for line in text.split("\n"):
            console.print(Text("    ") + line, soft_wrap=True)
        console.print()


def _groups(groups: Sequence[Sequence[str]]) -> list[str]:
    if not groups:
        return ["none"]
    lines = [f"{sum(map(len, groups)):,} rows in {_counted(len(groups), 'group')}"]
    for group in sorted(groups, key=len, reverse=True)[:SHOWN_GROUPS]:
        more = f" and {len(group) - SHOWN_PER_GROUP:,} more" if len(group) > SHOWN_PER_GROUP else ""
        lines.append(f"{'; '.join(group[:SHOWN_PER_GROUP])}{more}")
    return lines + _more(len(groups), "groups")


def _overlaps(overlaps: Overlaps) -> list[str]:
    if not overlaps.found:
        return [f"none of {_counted(overlaps.total, 'row')}"]
    lines = [
        f"{len(overlaps.found):,} of {overlaps.total:,} rows, with {_counted(len(overlaps.rows), 'row')} of the data"
    ]
    for each in overlaps.found[:SHOWN_GROUPS]:
        how = each.how if len(each.how) <= SHOWN_PASSAGE else f"{each.how[:SHOWN_PASSAGE]}..."
        lines.append(f"{each.where} and {each.row}: {how}")
    return lines + _more(len(overlaps.found), "rows")


def _more(count: int, what: str) -> list[str]:
    return [f"and {count - SHOWN_GROUPS:,} more {what} (--json lists all)"] if count > SHOWN_GROUPS else []


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
