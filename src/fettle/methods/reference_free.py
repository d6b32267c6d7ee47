"""Methods that compare the two answers of a pair without a reference model: ORPO and SimPO, with losses of our own.

Both work on the mean log-probability per token of each answer, c for the chosen and r for the rejected one:

    ORPO (Hong et al., 2024, arXiv 2403.07691):   -c - beta * log sigmoid(log odds(c) - log odds(r))
                                                  with odds(x) = exp(x) / (1 - exp(x))
    SimPO (Meng et al., 2024, arXiv 2405.14734):  -log sigmoid(beta * (c - r) - margin)

The loss is the mean over the pairs, so that a step of several batches equals one large batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from trl import DPOConfig

from fettle.methods.preference import (
    PairMethod,
    PairTrainer,
    answer_scores,
    pair_collator,
    tokenized_settings,
)
from fettle.runs.options import TrainOptions
from fettle.runs.recovery import Recovery

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the means (pairs,) of the chosen and of the rejected answers to each pair's loss."""


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    log_odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def simpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def _log_complement(log_prob: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0, exact for x near 0 (Maechler, 2012)."""
    log_prob = log_prob.clamp(max=-1e-7)  # below 0, or the other branch's gradient would be NaN
    return torch.where(log_prob > -0.6931, torch.log(-torch.expm1(log_prob)), torch.log1p(-log_prob.exp()))


class ReferenceFreeTrainer(PairTrainer):
    """pair_loss: the loss; beta: scale of the rewards that are logged."""

    def __init__(self, *args: Any, pair_loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pair_loss = pair_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
        scores, tokens = answer_scores(model, inputs)
        chosen, rejected = (scores / tokens.clamp(min=1)).chunk(2)
        logged = {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": self.beta * (chosen - rejected),
        }
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in logged.items():
            metrics[name].append(float(self.accelerator.gather(value.detach()).mean()))
        return self.pair_loss(chosen, rejected).mean()


class ReferenceFree(PairMethod):
    """ORPO or SimPO, by the options' method."""

    def trainer(self, options: TrainOptions, arguments: dict[str, Any], **parts: Any) -> Recovery:
        is_orpo = options.method == "orpo"
        beta = (0.1 if is_orpo else 2.0) if options.beta is None else options.beta
        margin = 1.0 if options.margin is None else options.margin

        def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
            if is_orpo:
                return orpo_loss(chosen, rejected, beta)
            return simpo_loss(chosen, rejected, beta, margin)

        config = DPOConfig(
            **arguments,
            beta=beta,
            **tokenized_settings(options),
        )
        collate = pair_collator(parts["processing_class"])
        return ReferenceFreeTrainer(args=config, pair_loss=loss, data_collator=collate, **parts)
