"""The result of a comparison, as plain data, as JSON and as a table."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fettle import terminal
from fettle.files import human_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model. perplexity: over its `tokens` trained tokens. exact_share: the share of its answers that match the
    row's exactly, 0 to 1; None if no row has a comparable answer."""

    name: str
    runtime: str
    perplexity: float
    tokens: int
    exact_share: float | None
    size_bytes: int
    prompt_tokens_per_second: float
    generated_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on the same rows.

    kl: mean KL(a || b) per token, in nats, over kl_tokens tokens. top_agreement: the share of positions where both
    predict the same most likely token. equal_answers: the share of identical texts among the `answers` that both gave;
    tokens_before_difference: the mean length of their common prefix. None: left out; `notes` say why.
    """

    rows: int
    a: Side
    b: Side
    kl: float | None
    kl_tokens: int
    top_agreement: float | None
    answers: int
    equal_answers: float | None
    tokens_before_difference: float | None
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return everything as JSON, with NaN and Inf, which JSON does not have, as null."""
        return json.dumps(_finite(asdict(self)), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the two models side by side, the distances between them, and what was left out."""
    console = console or terminal.console()
    a, b = comparison.a, comparison.b
    for letter, side in (("A", a), ("B", b)):
        console.print(
            f"{letter}  {side.name}  ({side.runtime})", markup=False, highlight=False, soft_wrap=True
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
    for note in comparison.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


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
