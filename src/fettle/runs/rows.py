"""From data files to packs for the trainer and questions for the before/after comparison."""

from dataclasses import dataclass
from hashlib import sha256
from random import Random

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fettle.data import (
    SKIP_HINT,
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
from fettle.data.named_templates import template_text
from fettle.errors import UserError, option, reason_of
from fettle.evaluation import Question, questions
from fettle.events import DataSummary
from fettle.runs.defaults import pack_length
from fettle.runs.options import LoopOptions, PretrainOptions, TrainOptions

MIN_WINDOWS_TO_HOLD_OUT = 20
"""With fewer windows, all of them are needed for training."""


@dataclass(slots=True, kw_only=True)
class RunData:
    """The prepared data of a run: packs to train and evaluate on, and questions to answer.

    train_lengths: tokens of each document in each pack; held_out_lengths: tokens of each held-out pack, whatever is
    computed together. held_out_examples: number of examples in `held_out`. shared_rows: number of held-out rows that
    also occur in the training data. notes: remarks on the held-out rows and those of `keep_data`.
    """

    train: Dataset
    held_out: Dataset | None
    train_lengths: list[list[int]]
    held_out_lengths: list[int]
    held_out_examples: int
    shared_rows: int
    held_out_questions: list[Question]
    keep_questions: list[Question]
    summary: Summary
    notes: list[str]


def read_data(source: str) -> Rows:
    """The rows of a data option. Rows that cannot be trained on are recorded, so that `prepare` reports all at once."""
    return read_rows(source, skip_bad_rows=True)


def split(options: LoopOptions, rows: Rows) -> tuple[Rows, Rows]:
    """Split into training rows and held-out rows: those of `eval_data`, or a fraction of the data."""
    if options.eval_data is not None:
        return rows, read_data(options.eval_data)
    train, held_out = split_held_out(rows, options.eval_fraction, options.seed)
    if not train:
        raise UserError(
            f"{option('eval_fraction')} {options.eval_fraction} holds out all {len(rows)} rows and leaves none to "
            "train on; use a smaller fraction."
        )
    return Rows(train, rows.reading), Rows(held_out)


def prepare(
    options: TrainOptions | PretrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int, rows: Rows
) -> RunData:
    """Tokenize and pack the rows and choose the questions. longest: the maximum tokens per row.

    Raises `BadRows` listing all rows that cannot be trained on, unless `skip_bad_rows` is set.
    """
    train_rows, held_out_rows = split(options, rows)
    keep_rows = read_data(options.keep_data) if options.keep_data is not None else Rows()
    held_out, bad = _tokenize_held_out(options, held_out_rows, tokenizer, longest)
    bad += keep_rows.reading.bad
    total = sum(len(each) + len(each.reading.bad) for each in (train_rows, held_out_rows, keep_rows))
    try:
        train = _tokenize(options, train_rows, tokenizer, longest)
    except NothingToTrainOn as error:
        if error.bad and not options.skip_bad_rows:
            raise BadRows(error.bad + bad, total, SKIP_HINT) from None
        raise
    bad = train.summary.bad + bad
    if bad and not options.skip_bad_rows:
        raise BadRows(bad, total, SKIP_HINT)
    examples = train.examples
    held_out_examples = held_out.examples if held_out else []
    if not held_out_rows and options.eval_data is None:
        examples, held_out_examples = _hold_out_windows(examples, options)
    length = pack_length([len(example.input_ids) for example in examples], longest)
    packs = _lay_out(examples, length, options.packing)
    held_out_packs = _lay_out(held_out_examples, length, options.packing) if held_out_examples else None
    return RunData(
        train=packs,
        held_out=held_out_packs,
        train_lengths=_document_lengths(packs),
        held_out_lengths=[] if held_out_packs is None else [len(ids) for ids in held_out_packs["input_ids"]],
        held_out_examples=len(held_out_examples),
        shared_rows=_shared(train_rows, held_out_rows),
        held_out_questions=sample(questions(held_out_rows, tokenizer), options),
        keep_questions=sample(keep_questions(options, keep_rows, tokenizer), options),
        summary=train.summary,
        notes=_notes(held_out, keep_rows),
    )


def _document_lengths(packs: Dataset) -> list[list[int]]:
    if "seq_lengths" in packs.column_names:
        return list(packs["seq_lengths"])
    return [[len(ids)] for ids in packs["input_ids"]]


def fingerprints(options: TrainOptions | PretrainOptions) -> dict[str, str]:
    """Fingerprints of the run's data files and chat template, by option, to detect changes before a resume."""
    sources = {"data": options.data, "eval_data": options.eval_data, "keep_data": options.keep_data}
    found = {name: fingerprint(source) for name, source in sources.items() if source is not None}
    if (template := getattr(options, "chat_template", None)) is not None:
        found["chat_template"] = sha256(template_text(template).encode()).hexdigest()
    return found


def summary_of(data: RunData, options: LoopOptions) -> DataSummary:
    """Return a summary of the data to report."""
    lines = data.summary.lines()
    if data.held_out_examples:
        lines.append(f"held-out examples: {data.held_out_examples:,}")
    elif options.eval_fraction == 0:
        lines.append("held-out examples: none, because the eval fraction is 0")
    else:
        lines.append("held-out examples: none, because there are too few rows")
    if data.shared_rows:
        lines.append(
            f"{data.shared_rows:,} held-out rows also occur in the training data: their scores do not "
            "measure generalization"
        )
    return DataSummary((*lines, *data.notes))


def _shared(train: list[Row], held_out: list[Row]) -> int:
    seen = {row.content for row in train}
    return sum(row.content in seen for row in held_out)


def sample(found: list[Question], options: LoopOptions) -> list[Question]:
    """At most `samples` questions, chosen at random because a file may be sorted."""
    if len(found) <= options.samples:
        return found
    return Random(options.seed).sample(found, options.samples)


def keep_questions(options: LoopOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    found = questions(rows, tokenizer)
    if not found and options.keep_data is not None:
        raise UserError(
            f"{option('keep_data')} {options.keep_data} has no row with an answer; expected chats, or prompts "
            "and completions."
        )
    return found


def _notes(held_out: Tokenized | None, keep: Rows) -> list[str]:
    """Remarks on rows that are not trained on: files read, rows left out."""
    lines = (*held_out.summary.read, *held_out.summary.losses()) if held_out else ()
    return [f"held out: {line}" for line in lines] + keep_notes(keep)


def keep_notes(keep: Rows) -> list[str]:
    """The same on the rows of `keep_data`."""
    left_out = [f"{len(keep.reading.bad):,} rows left out that cannot be used"] if keep.reading.bad else []
    return [f"old skills: {line}" for line in (*keep.reading.notes, *left_out)]


def _tokenize(
    options: TrainOptions | PretrainOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Tokenized:
    return tokenize_rows(rows, tokenizer, max_length=longest, train_on=options.train_on, skip_bad_rows=True)


def _tokenize_held_out(
    options: TrainOptions | PretrainOptions, rows: Rows, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[Tokenized | None, list[str]]:
    """The tokenized held-out rows (None if there are none), and the rows that cannot be scored."""
    if not rows:
        return None, []
    try:
        tokenized = _tokenize(options, rows, tokenizer, longest)
    except NothingToTrainOn as error:
        # a few rows of the training data, all too long: do without
        if options.eval_data is None or (error.bad and not options.skip_bad_rows):
            return None, error.bad
        raise UserError(f"{option('eval_data')} {options.eval_data}: {reason_of(error)}") from error
    return tokenized, list(tokenized.summary.bad)


def _hold_out_windows(examples: list[Example], options: LoopOptions) -> tuple[list[Example], list[Example]]:
    """Hold out the last windows of a few long texts, if there are too few rows to hold out whole ones."""
    count = round(options.eval_fraction * len(examples))
    if len(examples) < MIN_WINDOWS_TO_HOLD_OUT or count == 0:
        return examples, []
    return examples[:-count], examples[-count:]


def _lay_out(examples: list[Example], length: int, packing: bool) -> Dataset:
    if not packing:
        return unpacked(examples)
    return pack(examples, max(length, max(len(example.input_ids) for example in examples)))
