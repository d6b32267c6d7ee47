"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290), with the loss variants of TRL's trainer.

The reference is the model without its adapter, so one set of weights serves both.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from fettle.events import Report
from fettle.methods.preference import PairTrainer, held_out_scores, pair_collator, pair_rows
from fettle.runs.defaults import weighted_losses
from fettle.runs.options import TrainOptions
from fettle.runs.preference_rows import prepare_preferences
from fettle.runs.recovery import Recovery
from fettle.runs.rows import RunData


class DPO:
    def prepare(self, options: TrainOptions, tokenizer: PreTrainedTokenizerBase, longest: int) -> RunData:
        rows = pair_rows(has_dropout=options.dropout > 0)
        return prepare_preferences(rows, options, tokenizer, longest)

    def trainer(self, options: TrainOptions, arguments: dict[str, Any], **parts: Any) -> Recovery:
        weights = weighted_losses(options)
        config = DPOConfig(
            **arguments,
            beta=0.1 if options.beta is None else options.beta,
            loss_type=list(weights),
            loss_weights=list(weights.values()),
            label_smoothing=options.label_smoothing or 0.0,
            disable_dropout=options.dropout == 0,
            max_length=None,
            remove_unused_columns=False,
        )
        return PairTrainer(args=config, data_collator=pair_collator(parts["processing_class"]), **parts)

    def held_out(self, trainer: Recovery, when: str, report: Report) -> dict[str, float]:
        return held_out_scores(trainer, when, report)
