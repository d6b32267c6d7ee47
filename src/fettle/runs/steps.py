"""TRL's SFT trainer with steps that survive: out of memory, and a loss that is no number."""

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTTrainer

from fettle.errors import UserError
from fettle.models.decoder import DecoderForCausalLM
from fettle.runs.head import use_own_head
from fettle.runs.single_process import is_alone, skipped_walks


class Trainer(SFTTrainer):
    """step_leaner: makes the model keep less memory and returns True, or False where nothing leaner is left."""

    def __init__(self, *args: Any, step_leaner: Callable[[], bool] = lambda: False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if isinstance(base, DecoderForCausalLM):
            use_own_head(base)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self.step_leaner = step_leaner
        self._batches: list[dict[str, Any]] = []  # of the step at hand, to repeat it from its beginning
        self._beginning: _Beginning | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own."""
        with skipped_walks(self.model, self._trained) if is_alone() else nullcontext():
            return super().train(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one batch. An out-of-memory repeats the step's batches with a leaner plan,
        from the same random state; a loss that is no number ends the run before the weights are touched."""
        if self._beginning is None or self._beginning.step != self.state.global_step:
            self._beginning, self._batches = _Beginning(self), []
        self._batches.append(inputs)
        todo = [inputs]
        while True:
            try:
                for batch in todo:
                    loss: torch.Tensor = super().training_step(model, dict(batch), num_items_in_batch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not self.step_leaner():
                    raise UserError(
                        "out of memory even with the leanest plan; shorter rows (--max-length), --quantization nf4 "
                        "or a lower --rank need less."
                    ) from error
            self._beginning.restore(self)
            todo = self._batches
        if not torch.isfinite(loss):
            self._stop_at(inputs, float(loss))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the trainer's own; a loss that is no number ends the run before its weights are saved."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss is {loss} after step {self.state.global_step}: {self._fault()}; the weights of "
                "this step were not saved."
            )
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The trainer's own estimate, without counting the model's parameters anew at every batch."""
        return int(6 * inputs["input_ids"].numel() * self._parameters)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | None:
        if not is_alone():
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _stop_at(self, inputs: dict[str, Any], loss: float) -> None:
        """Save the state before this step, the last good one, and say which rows the batch was made of."""
        fault = self._fault()
        if self.state.global_step > 0 and all(bool(each.isfinite().all()) for each in self._trained):
            self.model.zero_grad()
            self._save_checkpoint(self.model, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)
        assert isinstance(self.train_dataset, Dataset)
        rows = rows_of(self.train_dataset, inputs["input_ids"].flatten().tolist())
        raise UserError(
            f"the loss is {loss} at step {self.state.global_step + 1}; the weights are still those before it. "
            f"The batch was made of {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}. {fault.capitalize()}, or "
            "look at these rows."
        )

    def _fault(self) -> str:
        """What is the likeliest reason for a loss that is no number, and what to do."""
        named = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        frozen = ((name, each) for name, each in named.named_parameters() if not each.requires_grad)
        broken = (name for name, each in frozen if each.is_floating_point() and not each.isfinite().all())
        if name := next(broken, None):
            return f"the model's own '{name}' holds numbers that are none: fetch the checkpoint again"
        if self.state.global_step > 0:
            return "the run has diverged: train again with a lower --learning-rate, into a new --output"
        return "no update had been made yet: the model gives no number for these rows"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or in the host's memory (PyTorch has no class for the latter)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def rows_of(packs: Dataset, tokens: list[int]) -> list[str]:
    """Where in the data the packs laid end to end in `tokens` come from."""
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


class _Beginning:
    """What a step changes before the optimiser does, to go back to."""

    def __init__(self, trainer: Trainer) -> None:
        self.step = trainer.state.global_step
        self.random = torch.get_rng_state()
        self.cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.tokens = trainer._total_train_tokens
        self.metrics = {name: len(values) for name, values in trainer._metrics["train"].items()}

    def restore(self, trainer: Trainer) -> None:
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state_all(self.cuda_random)
        torch.set_rng_state(self.random)
        trainer._total_train_tokens = self.tokens
        for name, values in trainer._metrics["train"].items():
            del values[self.metrics.get(name, 0) :]
