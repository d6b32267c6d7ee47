"""From files of compared answers to datasets for the preference trainers, as `rows.py` does for supervised training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fettle.data import SKIP_HINT, BadRows, NothingToTrainOn, Row, RowList, Rows, Summary, split_held_out
from fettle.errors import UserError, option, reason_of
from fettle.evaluation import questions
from fettle.runs.options import TrainOptions
from fettle.runs.rows import RunData, keep_notes, keep_questions, read_data, sample


@dataclass(frozen=True, slots=True)
class RowKind:
    """Rows of one kind of preference data.

    read, tokenize: `read_preferences` and `tokenize_preferences`, or those of another kind. shown: the row of
    supervised training whose answer is the expected one; None for a row that has none. lengths: the tokens of an
    example's documents, shared ones counted once. dataset: examples as rows of the trainer's dataset.
    """

    read: Callable[..., RowList[Any]]
    tokenize: Callable[..., tuple[list[Any], Summary]]
    shown: Callable[[Any], Row | None]
    lengths: Callable[[Any], list[int]]
    dataset: Callable[[Sequence[Any]], Dataset]


def prepare_preferences(
    kind: RowKind, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int
) -> RunData:
    """Read, split and tokenize the rows and choose the questions. longest: the maximum tokens per row.

    All rows with the same question are on the same side of the split. Raises `BadRows` listing all rows that cannot be
    trained on, unless `skip_bad_rows` is set.
    """
    rows = kind.read(options.data, skip_bad_rows=True)
    train_rows, held_out_rows = _split(kind, options, rows)
    keep_rows = None if options.keep_data is None else read_data(options.keep_data)
    bad = [] if keep_rows is None else list(keep_rows.reading.bad)
    total = sum(
        len(each) + len(each.reading.bad) for each in (train_rows, held_out_rows, keep_rows or Rows())
    )
    if options.eval_data is not None:
        bad += held_out_rows.reading.bad
    held_out: list[Any] = []
    notes: list[str] = []
    if held_out_rows:
        try:
            held_out, summary = kind.tokenize(
                held_out_rows, tokenizer, max_length=longest, skip_bad_rows=True
            )
            bad += summary.bad
            notes = [f"held out: {line}" for line in (*summary.read, *summary.losses())]
        except NothingToTrainOn as error:
            if options.eval_data is not None and not (error.bad and not options.skip_bad_rows):
                reason = reason_of(error)
                raise UserError(f"{option('eval_data')} {options.eval_data}: {reason}") from error
            bad += error.bad  # a few rows of the training data, all too long: do without
    try:
        examples, summary = kind.tokenize(train_rows, tokenizer, max_length=longest, skip_bad_rows=True)
    except NothingToTrainOn as error:
        if error.bad and not options.skip_bad_rows:
            raise BadRows(error.bad + bad, total, SKIP_HINT) from None
        raise
    if (summary.bad or bad) and not options.skip_bad_rows:
        raise BadRows(summary.bad + bad, total, SKIP_HINT)
    seen = {row.content for row in train_rows}
    shown = [row for each in held_out_rows if (row := kind.shown(each)) is not None]
    # the answers are too long and too free to be repeated word for word, so no exact match is counted
    asked = [replace(question, is_comparable=False) for question in questions(shown, tokenizer)]
    return RunData(
        train=kind.dataset(examples),
        held_out=kind.dataset(held_out) if held_out else None,
        train_lengths=[kind.lengths(example) for example in examples],
        held_out_lengths=[sum(kind.lengths(example)) for example in held_out],
        held_out_examples=len(held_out),
        shared_rows=sum(row.content in seen for row in held_out_rows),
        held_out_questions=sample(asked, options),
        keep_questions=[]
        if keep_rows is None
        else sample(keep_questions(options, keep_rows, tokenizer), options),
        summary=summary,
        notes=notes + ([] if keep_rows is None else keep_notes(keep_rows)),
    )


def _split(kind: RowKind, options: TrainOptions, rows: RowList[Any]) -> tuple[RowList[Any], RowList[Any]]:
    if options.eval_data is not None:
        return rows, kind.read(options.eval_data, skip_bad_rows=True)
    train, held_out = split_held_out(rows, options.eval_fraction, options.seed)
    if not train:
        raise UserError(
            f"{option('eval_fraction')} {options.eval_fraction} holds out all {len(rows)} rows and leaves none to "
            "train on; use a smaller fraction."
        )
    return RowList(train, rows.reading), RowList(held_out)
