"""Supervised fine-tuning: the loss is the mean over the trained tokens of packed rows. Also used for pretraining."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from fettle.data import collator
from fettle.events import Report, progress
from fettle.models.modes import evaluating
from fettle.runs.options import PretrainOptions, TrainOptions
from fettle.runs.recovery import Recovery
from fettle.runs.rows import RunData, prepare, read_data


class SupervisedTrainer(Recovery, SFTTrainer):
    """TRL's SFT trainer for packs made by `fettle.data.pack`."""

    def rows_of(self, inputs: dict[str, Any]) -> list[str]:
        assert isinstance(self.train_dataset, Dataset)
        return rows_of(self.train_dataset, inputs["input_ids"].flatten().tolist())


class Supervised:
    def prepare(
        self, options: TrainOptions | PretrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int
    ) -> RunData:
        return prepare(options, tokenizer, longest, read_data(options.data))

    def trainer(
        self, options: TrainOptions | PretrainOptions, arguments: dict[str, Any], **parts: Any
    ) -> SupervisedTrainer:
        config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        return SupervisedTrainer(args=config, data_collator=collator(parts["processing_class"]), **parts)

    @torch.no_grad()
    def held_out(self, trainer: Recovery, when: str, report: Report) -> dict[str, float]:
        """Return the mean loss and top-1 accuracy over the held-out tokens; empty if there are none.

        The mean is over tokens, not over batches as in the trainer's own evaluation, so it does not depend on how
        the rows are packed.
        """
        if trainer.eval_dataset is None:
            return {}
        loss, right, tokens = 0.0, 0, 0
        batches = trainer.get_eval_dataloader()
        with evaluating(trainer.model), progress(f"{when}: computing the held-out loss", report) as advance:
            for number, batch in enumerate(batches):
                advance(number / len(batches))
                inputs = trainer._prepare_inputs(batch)
                outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
                # log_probs is 0 at positions without a label
                loss -= float(outputs.log_probs.double().sum())
                right += int(outputs.is_top1.sum())
                tokens += int(outputs.label_mask.sum())
        return {"loss": loss / max(1, tokens), "token_accuracy": right / max(1, tokens)}


def rows_of(packs: Dataset, tokens: list[int]) -> list[str]:
    """Return the data rows of the packs that are concatenated in `tokens`."""
    found: list[str] = []
    start = 0
    every = packs["input_ids"]
    while start < len(tokens):
        fitting = (i for i, ids in enumerate(every) if tokens[start : start + len(ids)] == ids)
        index = next(fitting, None)
        if index is None:
            break
        found += packs[index]["rows"]
        start += len(every[index])
    return found
