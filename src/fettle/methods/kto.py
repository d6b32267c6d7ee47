"""Kahneman-Tversky optimization (Ethayarajh et al., 2024, arXiv 2402.01306): single answers labelled good or bad.

TRL's trainer; the reference is the model without its adapter. Its estimate of the KL divergence needs each prompt with
the answer to another one, which comes from the same batch, so a batch has several rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig, KTOTrainer
from trl.trainer.utils import use_adapter

from fettle.data import LabelledExample, read_labelled, tokenize_labelled
from fettle.data.tokenize import NOT_TRAINED
from fettle.events import Report, progress
from fettle.methods.preference import ComparingTrainer, answer_scores, as_dataset, padded, tokenized_settings
from fettle.models.modes import evaluating
from fettle.runs.defaults import weighted_losses
from fettle.runs.options import TrainOptions
from fettle.runs.preference_rows import RowKind, prepare_preferences
from fettle.runs.recovery import Recovery
from fettle.runs.rows import RunData


class LabelledTrainer(ComparingTrainer, KTOTrainer):
    """TRL's KTO trainer for labelled answers."""

    columns = ("prompt_ids", "completion_ids")


class KTO:
    def prepare(self, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int) -> RunData:
        kind = RowKind(
            read=read_labelled,
            tokenize=tokenize_labelled,
            shown=lambda row: row.row if row.is_desirable else None,
            lengths=lambda each: [len(each.prompt_ids) + len(each.completion_ids)],
            dataset=dataset_of,
        )
        return prepare_preferences(kind, options, tokenizer, longest)

    def trainer(self, options: TrainOptions, arguments: dict[str, Any], **parts: Any) -> Recovery:
        (loss,) = weighted_losses(options)
        config = KTOConfig(
            **arguments,
            beta=0.1 if options.beta is None else options.beta,
            loss_type=loss,
            **tokenized_settings(options),
        )
        return LabelledTrainer(
            args=config, data_collator=label_collator(parts["processing_class"], options.max_length), **parts
        )

    @torch.no_grad()
    def held_out(self, trainer: Recovery, when: str, report: Report) -> dict[str, float]:
        """Return the mean loss, and `told_apart`: how often a good answer has a higher reward than a bad one, over all
        such pairs of held-out answers; ties count half. Empty if there are none."""
        if trainer.eval_dataset is None:
            return {}
        losses: list[float] = []
        rewards: dict[bool, list[float]] = {True: [], False: []}
        batches = trainer.get_eval_dataloader()
        with evaluating(trainer.model), progress(f"{when}: scoring the held-out answers", report) as advance:
            for number, batch in enumerate(batches):
                advance(number / len(batches))
                inputs = trainer._prepare_inputs(batch)
                scores, _ = answer_scores(trainer.model, inputs)
                with use_adapter(trainer.model, adapter_name=None):
                    before, _ = answer_scores(trainer.model, inputs)
                for label, reward in zip(inputs["label"].tolist(), (scores - before).tolist(), strict=True):
                    rewards[bool(label)].append(reward)
                losses += [float(trainer.compute_loss(trainer.model, inputs))] * len(scores)
        trainer._metrics["eval"].clear()  # the trainer would log them with its next evaluation
        scores_found = {"loss": sum(losses) / max(1, len(losses))}
        if rewards[True] and rewards[False]:
            good, bad = (torch.tensor(rewards[kind])[:, None] for kind in (True, False))
            scores_found["told_apart"] = float(((good > bad.T).double() + 0.5 * (good == bad.T)).mean())
        return scores_found


def dataset_of(examples: Sequence[LabelledExample]) -> Dataset:
    names = ("prompt_ids", "completion_ids", "completion_labels")
    return as_dataset(examples, names, label=[each.is_desirable for each in examples])


def label_collator(
    tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return a function from rows to a batch for TRL's KTO trainer.

    The KL estimate is made from each prompt with the answer to another one: that of the row before it in the batch
    whose prompt differs, or its own if there is none, cut to `longest` tokens.
    """

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        own, other = [], []
        for number, row in enumerate(rows):
            prompt, hidden = row["prompt_ids"], [NOT_TRAINED] * len(row["prompt_ids"])
            before = (rows[number - step] for step in range(1, len(rows)))
            answer = next((each for each in before if each["prompt_ids"] != prompt), row)["completion_ids"]
            own.append((prompt + row["completion_ids"], hidden + row["completion_labels"]))
            other.append(((prompt + answer)[:longest], (hidden + answer)[:longest]))
        pad = tokenizer.pad_token_id or 0
        mismatched = {f"KL_{name}": each for name, each in padded(other, pad).items()}
        return {**padded(own, pad), **mismatched, "label": torch.tensor([row["label"] for row in rows])}

    return collate
