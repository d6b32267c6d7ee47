"""Rows on disk to packs for the trainer, and to questions for the before/after comparison."""

from dataclasses import dataclass
from random import Random

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fettle.data import (
    BadRows,
    Example,
    NothingToTrainOn,
    Row,
    Rows,
    Summary,
    Tokenized,
    fingerprint,
    pack,
    read_rows,
    split_held_out,
    tokenize_rows,
    unpacked,
)
from fettle.errors import UserError
from fettle.evaluation import Question, questions
from fettle.runs.defaults import pack_length
from fettle.runs.options import LoopOptions, PretrainOptions, TrainOptions

WAY_OUT = "To leave out and count such rows, give --skip-bad-rows."

FEWEST_WINDOWS = 20
"""A text of fewer windows is needed whole for training."""


@dataclass(slots=True, kw_only=True)
class Material:
    """Everything a run learns from and is measured on.

    held_out_examples: examples in `held_out`. shared_rows: held-out rows that are in the training data too.
    notes: what there is to say about the rows held out and those of `--keep-data`.
    """

    train: Dataset
    held_out: Dataset | None
    held_out_examples: int
    shared_rows: int
    asked: list[Question]
    kept: list[Question]
    summary: Summary
    notes: list[str]

    @property
    def train_lengths(self) -> list[list[int]]:
        """Tokens of each document of each pack."""
        if "seq_lengths" in self.train.column_names:
            return list(self.train["seq_lengths"])
        return [[len(ids)] for ids in self.train["input_ids"]]

    @property
    def held_out_lengths(self) -> list[int]:
        """Tokens of each held-out pack."""
        return [] if self.held_out is None else [len(ids) for ids in self.held_out["input_ids"]]


def read_data(source: str) -> Rows:
    """The rows of an option. Those that cannot be trained on are listed, for `prepare` to refuse with all others."""
    return read_rows(source, skip_bad_rows=True)


def split(options: LoopOptions, rows: Rows) -> tuple[Rows, Rows]:
    """Training rows and held-out rows: those of `--eval-data`, or a share of the data itself."""
    if options.eval_data is not None:
        return rows, read_data(options.eval_data)
    train, held_out = split_held_out(rows, options.eval_fraction, options.seed)
    if not train:
        raise UserError(
            f"--eval-fraction {options.eval_fraction} holds out all {len(rows)} rows and leaves none to train on; "
            "ask for less."
        )
    return Rows(train, rows.reading), Rows(held_out)


def prepare(
    options: TrainOptions | PretrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int, rows: Rows
) -> Material:
    """Tokenise, pack and choose what to ask. longest: tokens of the longest row that is not cut.

    Raises `BadRows` with all rows that cannot be trained on, unless `--skip-bad-rows` leaves them out.
    """
    train_rows, held_out_rows = split(options, rows)
    kept_rows = read_data(options.keep_data) if options.keep_data is not None else Rows()
    held_out, bad = _tokenize_held_out(options, held_out_rows, tokenizer, longest)
    bad += kept_rows.reading.bad
    total = sum(len(each) + len(each.reading.bad) for each in (train_rows, held_out_rows, kept_rows))
    try:
        train = _tokenize(options, train_rows, tokenizer, longest)
    except NothingToTrainOn as error:
        if error.bad and not options.skip_bad_rows:
            raise BadRows(error.bad + bad, total, WAY_OUT) from None
        raise
    bad = train.summary.bad + bad
    if bad and not options.skip_bad_rows:
        raise BadRows(bad, total, WAY_OUT)
    examples = train.examples
    held_out_examples = held_out.examples if held_out else []
    if not held_out_rows and options.eval_data is None:
        examples, held_out_examples = _hold_out_windows(examples, options)
    length = pack_length([len(example.input_ids) for example in examples], longest)
    return Material(
        train=_lay_out(examples, length, options.packing),
        held_out=_lay_out(held_out_examples, length, options.packing) if held_out_examples else None,
        held_out_examples=len(held_out_examples),
        shared_rows=_shared(train_rows, held_out_rows),
        asked=_sample(questions(held_out_rows, tokenizer), options),
        kept=_sample(_kept(options, kept_rows, tokenizer), options),
        summary=train.summary,
        notes=_notes(held_out, kept_rows),
    )


def fingerprints(options: TrainOptions | PretrainOptions) -> dict[str, str]:
    """What the run's data files hold, by option, to find a change before a resume."""
    sources = {"data": options.data, "eval_data": options.eval_data, "keep_data": options.keep_data}
    return {name: fingerprint(source) for name, source in sources.items() if source is not None}


def show_data(material: Material, options: LoopOptions, console: Console) -> None:
    """Print what the data was understood to be."""
    console.print("data", style="bold")
    lines = material.summary.lines()
    if material.held_out_examples:
        lines.append(f"examples held out to measure the result: {material.held_out_examples:,}")
    elif options.eval_fraction == 0:
        lines.append("nothing is held out, as --eval-fraction is 0")
    else:
        lines.append("nothing is held out: there are too few rows")
    if material.shared_rows:
        lines.append(
            f"{material.shared_rows:,} held-out rows are in the training data too: their scores say nothing "
            "about what was not seen"
        )
    for line in lines + material.notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _content(row: Row) -> str:
    return repr((row.messages, row.prompt, row.completion, row.text))


def _shared(train: list[Row], held_out: list[Row]) -> int:
    seen = {_content(row) for row in train}
    return sum(_content(row) in seen for row in held_out)


def _sample(asked: list[Question], options: LoopOptions) -> list[Question]:
    """At most `--samples` of them, chosen at random: a file may be sorted."""
    if len(asked) <= options.samples:
        return asked
    return Random(options.seed).sample(asked, options.samples)


def _kept(options: LoopOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    kept = questions(rows, tokenizer)
    if not kept and options.keep_data is not None:
        raise UserError(
            f"--keep-data {options.keep_data} holds no row with an answer; expected chats or prompts."
        )
    return kept


def _notes(held_out: Tokenized | None, kept: Rows) -> list[str]:
    """What is to be said about rows that are not trained on: files taken, rows left out."""
    notes = (
        [f"held out: {line}" for line in (*held_out.summary.read, *held_out.summary.losses())]
        if held_out
        else []
    )
    left_out = [f"{len(kept.reading.bad):,} rows left out that cannot be used"] if kept.reading.bad else []
    return notes + [f"--keep-data: {line}" for line in (*kept.reading.notes, *left_out)]


def _tokenize(
    options: TrainOptions | PretrainOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Tokenized:
    return tokenize_rows(rows, tokenizer, max_length=longest, train_on=options.train_on, skip_bad_rows=True)


def _tokenize_held_out(
    options: TrainOptions | PretrainOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[Tokenized | None, list[str]]:
    """The held-out rows, None where nothing is left of them, and those that cannot be scored."""
    if not rows:
        return None, []
    try:
        tokenized = _tokenize(options, rows, tokenizer, longest)
    except NothingToTrainOn as error:
        # A few rows of the user's own data, all too long: go without.
        if options.eval_data is None or (error.bad and not options.skip_bad_rows):
            return None, error.bad
        raise UserError(f"--eval-data {options.eval_data}: {error}") from error
    return tokenized, list(tokenized.summary.bad)


def _hold_out_windows(examples: list[Example], options: LoopOptions) -> tuple[list[Example], list[Example]]:
    """Few long texts make many windows: then the last of them are held out, as whole rows cannot be."""
    count = round(options.eval_fraction * len(examples))
    if len(examples) < FEWEST_WINDOWS or count == 0:
        return examples, []
    return examples[:-count], examples[-count:]


def _lay_out(examples: list[Example], length: int, packing: bool) -> Dataset:
    if not packing:
        return unpacked(examples)
    return pack(examples, max(length, max(len(example.input_ids) for example in examples)))
