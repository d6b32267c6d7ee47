"""What there is to know of each method before anything heavy is imported: for options, defaults and plans."""

from dataclasses import dataclass
from typing import Literal

MethodName = Literal["sft", "dpo", "kto", "orpo", "simpo"]


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """Facts about one way of training.

    help: for `--method`. options: those of `TrainOptions` that not every method has. losses: the names that `--loss`
    takes, the default first. epochs, batch_size: defaults. learning_rate_share: the default learning rate as a share of
    supervised fine-tuning's. rows: what kind of rows it takes. forward_passes: passes without gradient per step, each
    over as many tokens as a step trains on, such as that of the reference model.
    """

    help: str
    options: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    epochs: float = 1.0
    learning_rate_share: float = 0.05
    batch_size: int = 1
    rows: Literal["rows", "pairs", "labelled"] = "pairs"
    forward_passes: int = 0

    @property
    def answers(self) -> int:
        """Documents per row."""
        return 2 if self.rows == "pairs" else 1


METHOD_FACTS: dict[MethodName, MethodFacts] = {
    "sft": MethodFacts(
        "learn the answers", options=("train_on", "packing"), epochs=3.0, learning_rate_share=1.0, rows="rows"
    ),
    "dpo": MethodFacts(
        "prefer chosen to rejected answers, relative to the model before training",
        options=("beta", "loss", "label_smoothing"),
        losses=(
            *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair"),
            *("sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "discopop", "sft"),
        ),
        forward_passes=1,
    ),
    "kto": MethodFacts(
        "the same from single answers that are labelled good or bad",
        options=("beta", "loss"),
        losses=("kto", "apo_zero_unpaired"),
        batch_size=4,
        rows="labelled",
        forward_passes=3,  # the reference's, and both models' over prompts with the answers to others;
        # apo_zero_unpaired makes only the first, so its plan is on the safe side
    ),
    "orpo": MethodFacts(
        "learn the chosen answers and prefer them to the rejected ones, without a reference",
        options=("beta",),
        learning_rate_share=0.25,
    ),
    "simpo": MethodFacts(
        "prefer chosen answers by a margin, without a reference", options=("beta", "margin")
    ),
}
