"""Rows on disk to packs for the trainer, and to questions for the before/after comparison."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fettle.data import (
    Example,
    Row,
    Summary,
    Tokenized,
    pack,
    read_rows,
    split_held_out,
    tokenize_rows,
    unpacked,
)
from fettle.errors import UserError
from fettle.evaluation import Question, questions
from fettle.training.defaults import pack_length
from fettle.training.options import LoopOptions, PretrainOptions, TrainOptions

FEWEST_WINDOWS = 20
"""A text of fewer windows is needed whole for training."""


@dataclass(slots=True, kw_only=True)
class Material:
    """Everything a run learns from and is measured on."""

    train: Dataset
    held_out: Dataset | None
    held_out_examples: int
    asked: list[Question]
    kept: list[Question]
    summary: Summary


def split(options: LoopOptions, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows: those of `--eval-data`, or a share of the data itself."""
    if options.eval_data is not None:
        return rows, read_rows(options.eval_data)
    train, held_out = split_held_out(rows, options.eval_fraction, options.seed)
    if not train:
        raise UserError(
            f"--eval-fraction {options.eval_fraction} holds out all {len(rows)} rows and leaves none to train on; "
            "ask for less."
        )
    return train, held_out


def prepare(
    options: TrainOptions | PretrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int, rows: list[Row]
) -> Material:
    """Tokenise, pack and choose what to ask. longest: tokens of the longest row that is not cut."""
    train_rows, held_out_rows = split(options, rows)
    train = tokenize_rows(train_rows, tokenizer, max_length=longest, train_on=options.train_on)
    held_out = _tokenize_held_out(options, held_out_rows, tokenizer, longest)
    examples = train.examples
    held_out_examples = held_out.examples if held_out else []
    if not held_out_rows and options.eval_data is None:
        examples, held_out_examples = _hold_out_windows(examples, options)
    length = pack_length([len(example.input_ids) for example in examples], longest)
    kept_rows = read_rows(options.keep_data) if options.keep_data is not None else []
    return Material(
        train=_lay_out(examples, length, options.packing),
        held_out=_lay_out(held_out_examples, length, options.packing) if held_out_examples else None,
        held_out_examples=len(held_out_examples),
        asked=questions(held_out_rows, tokenizer)[: options.samples],
        kept=questions(kept_rows, tokenizer)[: options.samples],
        summary=train.summary,
    )


def _tokenize_held_out(
    options: TrainOptions | PretrainOptions, rows: list[Row], tokenizer: PreTrainedTokenizerBase, longest: int
) -> Tokenized | None:
    if not rows:
        return None
    try:
        return tokenize_rows(rows, tokenizer, max_length=longest, train_on=options.train_on)
    except UserError as error:
        if options.eval_data is None:  # a few rows of the user's own data, all too long: go without
            return None
        raise UserError(f"--eval-data {options.eval_data}: {error}") from error


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
