"""What the methods that learn from pairs of a chosen and a rejected answer share.

A step scores both answers of a few pairs in one packed row, in which a pair's prompt is computed once (runs/head.py).
The trainer is TRL's DPO trainer, for its data order and metrics; rows come tokenized, and a method may have its own
loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from fettle.data import read_preferences, tokenize_preferences
from fettle.data.batches import BalancedSampler
from fettle.data.tokenize import NOT_TRAINED
from fettle.events import Report, progress
from fettle.models.modes import evaluating
from fettle.runs.options import TrainOptions
from fettle.runs.preference_rows import RowKind, prepare_preferences
from fettle.runs.recovery import Recovery
from fettle.runs.rows import RunData


class ComparingTrainer(Recovery):
    """A trainer of rows that are already tokenized, in batches with about as many tokens each.

    columns: those of the dataset whose tokens a step computes; the first two are a row's first document.
    """

    columns: tuple[str, ...]

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> BalancedSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [sum(map(len, row)) for row in zip(*(rows[name] for name in self.columns), strict=True)]
        # exact: at the end of an epoch the trainer sets a whole number
        return BalancedSampler(
            lengths, self.args.train_batch_size, self.args.seed, lambda: int(self.state.epoch or 0)
        )

    def rows_of(self, inputs: dict[str, Any]) -> list[str]:
        found = []
        for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
            tokens = [token for token, is_real in zip(ids, mask, strict=True) if is_real]
            found += [
                row["where"]
                for row in self.train_dataset
                if [*row[self.columns[0]], *row[self.columns[1]]] == tokens
            ]
        return found


class PairTrainer(ComparingTrainer, DPOTrainer):
    """TRL's DPO trainer for pairs."""

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")

    @property
    def has_dropout(self) -> bool:
        return not self.args.disable_dropout

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the prompt of a pair once, if it is computed once."""
        real = inputs["attention_mask"].sum(-1)
        prompts = real - inputs["completion_mask"].sum(-1)
        shared = 0 if self.has_dropout else prompts[len(prompts) // 2 :].sum()
        self.state.num_input_tokens_seen += int(real.sum() - shared)


def answer_scores(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability and the number of tokens of each answer in a batch of TRL's collator."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    outputs = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )
    return outputs.log_probs.sum(-1), outputs.label_mask.sum(-1)


@torch.no_grad()
def held_out_scores(trainer: Recovery, when: str, report: Report) -> dict[str, float]:
    """Return the method's mean loss over the held-out pairs, and `preferred`: the share of pairs whose chosen answer
    has the higher log-probability per token. Empty if there are none."""
    if trainer.eval_dataset is None:
        return {}
    loss, preferred, pairs = 0.0, 0, 0
    batches = trainer.get_eval_dataloader()
    with evaluating(trainer.model), progress(f"{when}: comparing the held-out pairs", report) as advance:
        for number, batch in enumerate(batches):
            advance(number / len(batches))
            inputs = trainer._prepare_inputs(batch)
            scores, tokens = answer_scores(trainer.model, inputs)
            chosen, rejected = (scores / tokens.clamp(min=1)).chunk(2)
            preferred += int((chosen > rejected).sum())
            loss += float(trainer.compute_loss(trainer.model, inputs)) * len(chosen)
            pairs += len(chosen)
    trainer._metrics["eval"].clear()  # the trainer would log them with its next evaluation
    return {"loss": loss / max(1, pairs), "preferred": preferred / max(1, pairs)}


def pair_rows(*, has_dropout: bool) -> RowKind:
    """Return how pairs are read. With dropout a prompt is computed for each answer (see `runs/head.py`)."""
    copies = 1 if has_dropout else 0
    return RowKind(
        read=read_preferences,
        tokenize=tokenize_preferences,
        shown=lambda row: row.chosen,
        lengths=lambda pair: [
            len(pair.prompt_ids) + len(pair.chosen_ids),
            copies * len(pair.prompt_ids) + len(pair.rejected_ids),
        ],
        dataset=lambda pairs: as_dataset(
            pairs, ("prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")
        ),
    )


PAIRS = pair_rows(has_dropout=False)


class PairMethod:
    """What a method that learns from pairs reads, and how it is scored on held-out pairs (see `runs/method.py`)."""

    def prepare(self, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int) -> RunData:
        rows = pair_rows(has_dropout=options.dropout > 0)
        return prepare_preferences(rows, options, tokenizer, longest)

    def held_out(self, trainer: Recovery, when: str, report: Report) -> dict[str, float]:
        return held_out_scores(trainer, when, report)


def tokenized_settings(options: TrainOptions) -> dict[str, Any]:
    """Return the settings of TRL's configs for rows that are already tokenized and cut to length."""
    return {
        "disable_dropout": options.dropout == 0,
        "max_length": None,
        "remove_unused_columns": False,
    }


def as_dataset(examples: Sequence[Any], names: Sequence[str], **flags: list[bool]) -> Dataset:
    """Return a dataset with a column for each of these token lists, one for `where`, and flags."""
    columns: dict[str, list[Any]] = {name: [getattr(each, name) for each in examples] for name in names}
    where = {"where": [str(each.where) for each in examples]}
    types = {name: List(Value("int32")) for name in names} | {"where": Value("string")}
    types |= {name: Value("bool") for name in flags}
    return Dataset.from_dict(columns | where | flags, features=Features(types))


def padded(documents: Sequence[tuple[list[int], list[int]]], pad_token: int) -> dict[str, torch.Tensor]:
    """Return a batch as TRL's collators make it, of documents given as ids and labels.

    input_ids, attention_mask, completion_mask: (documents, longest).
    """
    ids = [torch.tensor(ids) for ids, _ in documents]
    labels = [torch.tensor(labels) for _, labels in documents]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "completion_mask": pad_sequence([(each != NOT_TRAINED).long() for each in labels], batch_first=True),
    }


def pair_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a function from rows to a batch for TRL's DPO trainer: all chosen answers, then all rejected ones."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        documents = [
            (
                row["prompt_ids"] + row[f"{side}_ids"],
                [NOT_TRAINED] * len(row["prompt_ids"]) + row[f"{side}_labels"],
            )
            for side in ("chosen", "rejected")
            for row in rows
        ]
        return padded(documents, tokenizer.pad_token_id or 0)

    return collate
