"""What fettle understands of a data file, before any training: counts, lengths, masks, doubtful rows, duplicates.

Reading and tokenizing are those of a run, so what is shown is what a run trains on.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from fettle.data.chat import Segment, TrainOn
from fettle.data.named_templates import set_chat_template
from fettle.data.ngrams import Vocabulary
from fettle.data.overlap import Sketches, near_groups, near_matches, passages
from fettle.data.preference_formats import read_labelled, read_preferences
from fettle.data.preferences import tokenize_labelled, tokenize_preferences
from fettle.data.read import read_rows, records
from fettle.data.rows import SKIP_HINT, BadRows, LabelledRow, PreferenceRow, Row, RowList, Rows
from fettle.data.summary import Summary
from fettle.data.tokenize import NothingToTrainOn, Tokenized, tokenize_rows
from fettle.data.tokenizer import Tokenizer
from fettle.errors import UserError, option, reason_of
from fettle.events import Report, ignore, progress

Kind = Literal["rows", "pairs", "labelled"]
"""What a method of training takes: rows of supervised training, pairs of answers, or labelled answers."""

SHOWN_WORST = 3
PERCENTILES = (50, 90, 99, 100)

MIN_NOISE = 0.5
"""Share of characters that are neither letters, digits nor white space. Source code has up to 0.35."""
MIN_NOISY_CHARACTERS = 40
MIN_REPEATS, MIN_REPEATED_SHARE, MIN_LINE = 4, 0.2, 10
"""A line of at least 10 characters that occurs 4 times and makes up a fifth of a row's lines counts as repeated."""
REPLACEMENT = "\ufffd"

_NOISE = re.compile(r"[^\w\s]")


@dataclass(frozen=True, slots=True)
class Bin:
    """The number of rows with at least `start` and fewer than `end` tokens."""

    start: int
    end: int
    rows: int


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as the template renders it, up to the maximum length, in segments that are trained on or not."""

    where: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Rows to look at: what they are, how many, and the worst of them as (where, why)."""

    what: str
    rows: int
    worst: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A held-out row or benchmark row (`where`), the row of the data that it overlaps, and how."""

    where: str
    row: str
    how: str


@dataclass(frozen=True, slots=True)
class Overlaps:
    """What the data shares with other rows: how many those are, each that overlaps, and the rows of the data."""

    total: int
    found: tuple[Overlap, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What `inspect_data` found. Rows are named by file and line.

    percentiles: tokens per row before truncation, by per cent. duplicates, near_duplicates: groups of rows. held_out,
    benchmark: None if there was nothing to compare with.
    """

    summary: Summary
    percentiles: dict[int, int]
    histogram: tuple[Bin, ...]
    shown: tuple[ShownRow, ...]
    findings: tuple[Finding, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    held_out: Overlaps | None = None
    benchmark: Overlaps | None = None

    def as_json(self) -> str:
        """Return everything as JSON."""
        names = "max_length rows examples tokens trained_tokens cut split end_of_turn bad".split()
        counts = {name: getattr(self.summary, name) for name in names}
        dropped = [{"where": where, "why": why} for where, why in self.summary.dropped]
        parts = ("percentiles", "histogram", "shown", "findings", "held_out", "benchmark")
        found: dict[str, Any] = {name: _plain(getattr(self, name)) for name in parts}
        formats, notes = dict(self.summary.formats), self.summary.counts()
        groups = {"duplicates": self.duplicates, "near_duplicates": self.near_duplicates}
        return json.dumps(
            counts | {"formats": formats, "dropped": dropped, "lines": notes} | found | groups,
            indent=2,
            ensure_ascii=False,
        )


def inspect_data(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    kind: Kind = "rows",
    train_on: TrainOn = "assistant",
    skip_bad_rows: bool = False,
    chat_template: str | None = None,
    eval_data: str | Path | None = None,
    benchmark: str | Path | None = None,
    rows: int = 3,
    report: Report = ignore,
) -> DataReport:
    """Return what training on the rows of `source` would train on, and which rows deserve a look.

    kind: what a row is: one of supervised training, a pair of answers, or a labelled answer; each answer of a pair is
    then shown as a row. eval_data: held-out rows, and benchmark: rows of any columns, that the data should not overlap.
    rows: how many to show with their masks. Sets the tokenizer's chat template if it has none, or to the one named
    `chat_template`.
    Raises UserError for what cannot be read, and BadRows unless `skip_bad_rows`.
    """
    if rows < 0:
        raise UserError(f"{option('rows')} is {rows}; expected 0 or more.")
    template = set_chat_template(tokenizer, chat_template) if chat_template is not None else []
    given = _READ[kind](source, skip_bad_rows=True)
    read, others = _answers(given), None
    if eval_data is not None:
        held_out = _READ[kind](eval_data, skip_bad_rows=skip_bad_rows)
        others = _main_answers(held_out)
    texts = list(_benchmark_texts(benchmark)) if benchmark is not None else None
    options: dict[str, Any] = {"max_length": max_length, "train_on": train_on}
    try:
        with progress("tokenizing rows", report) as advance:
            tokenized = tokenize_rows(read, tokenizer, skip_bad_rows=True, advance=advance, **options)
        bad = tokenized.summary.bad
    except NothingToTrainOn as error:
        if not error.bad or skip_bad_rows:
            raise
        bad = error.bad
    if kind != "rows" and not (bad and not skip_bad_rows):
        tokenize: Any = tokenize_preferences if kind == "pairs" else tokenize_labelled
        _, summary = tokenize(given, tokenizer, max_length=max_length, skip_bad_rows=True)
        summary.lengths, bad = tokenized.summary.lengths, summary.bad
    if bad and not skip_bad_rows:
        raise BadRows(bad, len(given) + len(given.reading.bad), SKIP_HINT)
    if kind == "rows":
        summary = tokenized.summary
    summary.template += template
    duplicates, firsts = _duplicates(_main_answers(given))
    comparison = _Comparison(firsts, report)
    return DataReport(
        summary=summary,
        percentiles=_percentiles(list(summary.lengths.values())),
        histogram=_histogram(list(summary.lengths.values()), max_length),
        shown=tuple(_shown(read, tokenized, tokenizer, rows, options)),
        findings=tuple(_findings(read, tokenized)),
        duplicates=duplicates,
        near_duplicates=comparison.near_duplicates(),
        held_out=comparison.with_held_out(others) if others is not None else None,
        benchmark=comparison.with_benchmark(texts) if texts is not None else None,
    )


_READ: dict[Kind, Callable[..., RowList[Any]]] = {
    "rows": read_rows,
    "pairs": read_preferences,
    "labelled": read_labelled,
}


def _answers(rows: RowList[Any]) -> Rows:
    """Return every answer as a row of supervised training."""
    found: list[Row] = []
    for row in rows:
        sides: tuple[tuple[Row, str], ...]
        if isinstance(row, PreferenceRow):
            sides = ((row.chosen, "chosen"), (row.rejected, "rejected"))
        elif isinstance(row, LabelledRow):
            sides = ((row.row, "good" if row.is_desirable else "bad"),)
        else:
            found.append(row)
            continue
        found += [replace(side, where=f"{side.where} ({name})") for side, name in sides]
    return Rows(found, rows.reading)


def _main_answers(rows: RowList[Any]) -> list[Row]:
    """Return one row of supervised training per row, to compare rows with each other: of a pair the chosen answer."""
    kinds = {PreferenceRow: lambda row: row.chosen, LabelledRow: lambda row: row.row}
    return [kinds.get(type(row), lambda row: row)(row) for row in rows]


# ---- lengths and masks ---------------------------------------------------------------------------------------


def _percentiles(lengths: Sequence[int]) -> dict[int, int]:
    ordered = sorted(lengths)
    return {share: ordered[ceil(share / 100 * len(ordered)) - 1] for share in PERCENTILES if ordered}


def _histogram(lengths: Sequence[int], max_length: int) -> tuple[Bin, ...]:
    """Return bins of doubling width, two per power of two, with a border behind `max_length` if rows exceed it."""
    if not lengths:
        return ()
    edges = {1, max_length + 1} if max(lengths) > max_length else {1}
    edges |= {(width << power) + 1 for power in range(max(lengths).bit_length()) for width in (2, 3)}
    bounds = sorted(edges)
    counts = Counter(bisect_right(bounds, length) - 1 for length in lengths)
    used = range(min(counts), max(counts) + 1)
    return tuple(Bin(bounds[i], bounds[i + 1], counts[i]) for i in used)


def _shown(
    rows: Sequence[Row], tokenized: Tokenized, tokenizer: Tokenizer, count: int, options: dict[str, Any]
) -> Iterator[ShownRow]:
    """Yield rows at equal distances among those that are trained on, as a file may be sorted."""
    trained = {example.where for example in tokenized.examples}
    usable = [row for row in rows if row.where in trained]
    for number in range(min(count, len(usable))):
        row = usable[number * len(usable) // count if count < len(usable) else number]
        yield ShownRow(row.where, tuple(tokenize_rows([row], tokenizer, **options).summary.example))


# ---- rows to look at -----------------------------------------------------------------------------------------


def _findings(rows: Sequence[Row], tokenized: Tokenized) -> Iterator[Finding]:
    lengths = tokenized.summary.lengths
    trained: Counter[str] = Counter()
    for example in tokenized.examples:
        trained[example.where] += example.trained_tokens
    longest = {where: (f"{length:,} tokens", length) for where, length in lengths.items()}
    fewest = {
        where: (f"{count:,} of {lengths[where]:,} tokens trained on", -count)
        for where, count in trained.items()
    }
    yield _finding("longest rows", longest, total=len(lengths))
    yield _finding("rows with the fewest trained tokens", fewest, total=len(trained))
    texts = {row.where: _text(row, with_system=True) for row in rows}
    broken = {
        where: (f"{count:,} of them", count)
        for where, text in texts.items()
        if (count := text.count(REPLACEMENT))
    }
    noisy = {
        where: (f"{noise:.0%} of its characters", noise)
        for where, text in texts.items()
        if (noise := len(_NOISE.findall(text)) / max(len(text), 1)) >= MIN_NOISE
        and len(text) >= MIN_NOISY_CHARACTERS
    }
    repeating = {
        where: (f"{count:,} times {line[:40]!r}", count)
        for where, text in texts.items()
        for line, count in _repeated_line(text)
    }
    for what, found in (
        ("rows with replacement characters (U+FFFD): their encoding was broken", broken),
        ("rows that are mostly neither letters nor digits", noisy),
        ("rows that repeat a line", repeating),
    ):
        if found:
            yield _finding(what, found, total=len(found))


def _finding(what: str, found: Mapping[str, tuple[str, float]], total: int) -> Finding:
    worst = sorted(found.items(), key=lambda item: -item[1][1])[:SHOWN_WORST]
    return Finding(what, total, tuple((where, why) for where, (why, _) in worst))


def _repeated_line(text: str) -> Iterator[tuple[str, int]]:
    """Yield the most frequent line, if it counts as repeated, and how often it occurs."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < MIN_REPEATS:
        return
    for line, count in Counter(line for line in lines if len(line) >= MIN_LINE).most_common(1):
        if count >= max(MIN_REPEATS, MIN_REPEATED_SHARE * len(lines)):
            yield line, count


def _text(row: Row, *, with_system: bool) -> str:
    """Return the row's text. without the system text, which rows share, for a comparison."""
    turns = [m["content"] for m in row.messages if with_system or m["role"] != "system"]
    calls = [call["function"] for m in row.messages for call in m.get("tool_calls", ())]
    turns += [f"{call['name']} {call['arguments']}" for call in calls]
    return "\n".join([*turns, *(text for text in (row.prompt, row.completion, row.text) if text is not None)])


# ---- duplicates and overlaps ---------------------------------------------------------------------------------


def _duplicates(rows: Sequence[Row]) -> tuple[tuple[tuple[str, ...], ...], list[Row]]:
    """Return the groups of identical rows, and the first row of every group or the only one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.content, []).append(row)
    same = tuple(tuple(row.where for row in group) for group in groups.values() if len(group) > 1)
    return same, [group[0] for group in groups.values()]


class _Comparison:
    """Distinct rows, to be compared with each other and with others."""

    def __init__(self, rows: Sequence[Row], report: Report) -> None:
        self.rows, self.report = rows, report
        self.vocabulary = Vocabulary()
        self.sketches = self._sketches(rows, "comparing rows")

    def near_duplicates(self) -> tuple[tuple[str, ...], ...]:
        groups = near_groups(self.sketches)
        return tuple(tuple(self.rows[number].where for number in group) for group in groups)

    def with_held_out(self, others: Sequence[Row]) -> Overlaps:
        own = {row.content: row.where for row in self.rows}
        near = near_matches(self.sketches, self._sketches(others, "comparing held-out rows"))
        found = []
        for number, other in enumerate(others):
            if (same := own.get(other.content)) is not None:
                found.append(Overlap(other.where, same, "identical"))
            elif number in near:
                found.append(Overlap(other.where, self.rows[near[number]].where, "nearly the same"))
        return Overlaps(len(others), tuple(found), tuple(dict.fromkeys(each.row for each in found)))

    def with_benchmark(self, texts: Sequence[tuple[str, str]]) -> Overlaps:
        ours = self.sketches.texts
        shared, sharing = passages(ours, self.vocabulary.encode(text for _, text in texts))
        found: dict[str, Overlap] = {}
        for number, (row, place, words) in sorted(shared.items()):
            where = texts[number][0]
            passage = self.vocabulary.decode(ours.words[place : place + words])
            found.setdefault(where, Overlap(where, self.rows[row].where, f"{words} words: {passage}"))
        rows = tuple(self.rows[number].where for number in sorted(sharing))
        return Overlaps(len({where for where, _ in texts}), tuple(found.values()), rows)

    def _sketches(self, rows: Sequence[Row], task: str) -> Sketches:
        texts = self.vocabulary.encode(_text(row, with_system=False) for row in rows)
        with progress(task, self.report) as advance:
            return Sketches(texts, advance)


def _benchmark_texts(source: str | Path) -> Iterator[tuple[str, str]]:
    """Yield every text of a benchmark's rows, in any column and at any depth, with its row."""
    for record, where in records(source):
        if isinstance(record, UserError):
            raise UserError(f"{option('benchmark')} {source}: {reason_of(record)}")
        yield from ((where, text) for text in _texts_in(record))


def _texts_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(each)


def _plain(value: Any) -> Any:
    """Return dataclasses, and tuples of them, as what `json` writes."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
