"""Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290), with the loss variants of TRL's trainer.

The reference is the model without its adapter, so one set of weights serves both.
"""

from typing import Any

from trl import DPOConfig

from fettle.methods.preference import PairMethod, PairTrainer, pair_collator, tokenized_settings
from fettle.runs.defaults import weighted_losses
from fettle.runs.options import TrainOptions
from fettle.runs.recovery import Recovery


class DPO(PairMethod):
    def trainer(self, options: TrainOptions, arguments: dict[str, Any], **parts: Any) -> Recovery:
        weights = weighted_losses(options)
        config = DPOConfig(
            **arguments,
            beta=0.1 if options.beta is None else options.beta,
            loss_type=list(weights),
            loss_weights=list(weights.values()),
            label_smoothing=options.label_smoothing or 0.0,
            **tokenized_settings(options),
        )
        return PairTrainer(args=config, data_collator=pair_collator(parts["processing_class"]), **parts)
