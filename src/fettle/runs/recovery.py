"""What every trainer of fettle adds to TRL's: fettle's head, recovery when memory runs out, a stop when the loss is NaN
or Inf, and gradients clipped without walking over the frozen modules."""

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from fettle.errors import UserError, option
from fettle.models.decoder import DecoderForCausalLM
from fettle.runs.head import use_own_head
from fettle.runs.single_process import is_single_process, without_module_walks

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class Recovery(_Base):
    """A mixin before a TRL trainer that has `_metrics` and `_total_train_tokens`.

    use_leaner_plan: switches the model to a plan with less memory and returns True, or returns False if there is none.
    temperature: of the head (see `use_own_head`).
    """

    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    def __init__(
        self,
        *args: Any,
        use_leaner_plan: Callable[[], bool] = lambda: False,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            # TRL's copy of the adapter as reference: a new adapter changes nothing, so it is the model without it
            self.model.delete_adapter("ref")
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if isinstance(base, DecoderForCausalLM):
            use_own_head(base, temperature=temperature)
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        self.use_leaner_plan = use_leaner_plan
        self._batches: list[dict[str, Any]] = []  # of the current step, to repeat it from its start
        self._step_start: _StepStart | None = None

    def rows_of(self, inputs: dict[str, Any]) -> list[str]:
        """Return the data rows of a batch, as "file:line"."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, without module walks in a single process."""
        with without_module_walks(self.model, self._trained) if is_single_process() else nullcontext():
            return super().train(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward pass of one batch. After an out-of-memory error the step's batches are repeated with a
        leaner plan from the same random state. A loss of NaN or Inf ends the run before the weights are updated."""
        if self._step_start is None or self._step_start.step != self.state.global_step:
            self._step_start, self._batches = _StepStart(self), []
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
                if not self.use_leaner_plan():
                    raise UserError(
                        f"out of memory even with the leanest plan; reduce {option('max_length')} or {option('rank')}, "
                        f"or use {option('quantization')} nf4."
                    ) from error
            self._step_start.restore(self)
            todo = self._batches
        if not torch.isfinite(loss):
            self._stop_at(inputs, float(loss))
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the base class; a loss of NaN or Inf ends the run before its weights are saved."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise UserError(
                f"the held-out loss is {loss} after step {self.state.global_step}; the weights of this step were "
                f"not saved. Probable cause: {self._probable_cause()}."
            )
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The trainer's own estimate, without counting the model's parameters again for every batch."""
        return int(6 * inputs["input_ids"].numel() * self._parameters)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | None:
        if not is_single_process():
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _stop_at(self, inputs: dict[str, Any], loss: float) -> None:
        """Save the state before this step, the last good one, and raise UserError naming the rows of the batch."""
        cause = self._probable_cause()
        if self.state.global_step > 0 and all(bool(each.isfinite().all()) for each in self._trained):
            self.model.zero_grad()
            self._save_checkpoint(self.model, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)
        rows = self.rows_of(inputs)
        raise UserError(
            f"the loss is {loss} at step {self.state.global_step + 1}; the weights were not updated. "
            f"Probable cause: {cause}. Rows of this batch: {', '.join(rows[:8])}"
            f"{' ...' if len(rows) > 8 else '.'}"
        )

    def _probable_cause(self) -> str:
        """The most likely cause of a loss of NaN or Inf, and its fix."""
        named = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        frozen = ((name, each) for name, each in named.named_parameters() if not each.requires_grad)
        broken = (name for name, each in frozen if each.is_floating_point() and not each.isfinite().all())
        if name := next(broken, None):
            return f"the model's frozen '{name}' contains NaN or Inf; download the checkpoint again"
        if self.state.global_step > 0:
            lower, new = option("learning_rate"), option("output")
            return f"training diverged; train again with a lower {lower}, into a new {new}"
        return "the model computes NaN or Inf for these rows even before the first update"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or in the host's memory (PyTorch has no class for the latter)."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class _StepStart:
    """The state at the start of a step that its batches change, to restore before they are repeated."""

    def __init__(self, trainer: Recovery) -> None:
        self.step = trainer.state.global_step
        self.random = torch.get_rng_state()
        self.cuda_random = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self.tokens = trainer._total_train_tokens
        self.metrics = {name: len(values) for name, values in trainer._metrics["train"].items()}

    def restore(self, trainer: Recovery) -> None:
        trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state_all(self.cuda_random)
        torch.set_rng_state(self.random)
        trainer._total_train_tokens = self.tokens
        for name, values in trainer._metrics["train"].items():
            del values[self.metrics.get(name, 0) :]
