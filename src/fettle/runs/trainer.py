"""Set up a method's trainer, and run it: checkpoints, Ctrl-C, the log."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fettle.errors import UserError, option, reason_of
from fettle.events import Report
from fettle.models.progress_bars import without_progress_bars
from fettle.planning.program import peak_memory_bytes, reset_peak_memory
from fettle.runs.held_out import WatchHeldOut, best_checkpoint
from fettle.runs.memory_plan import RunPlan
from fettle.runs.method import Method
from fettle.runs.options import LoopOptions
from fettle.runs.progress import Point, ProgressCallback, points, report_progress
from fettle.runs.recovery import Recovery
from fettle.runs.resume import CHECKPOINTS, MarkComplete, last_complete
from fettle.runs.rows import RunData

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C, finishes the step, saves a checkpoint and stops. A second Ctrl-C stops immediately."""

    def __init__(self) -> None:
        self.is_interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_interrupted:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C while the block runs (only in the main thread, as signals allow)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(*_: Any) -> None:
            self.is_interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass(slots=True)
class Run:
    """A trainer with its progress and its Ctrl-C handler."""

    trainer: Recovery
    progress: ProgressCallback
    interrupt: StopOnInterrupt
    watch: WatchHeldOut | None = None
    """With `keep_best`."""
    peak_before_bytes: int = 0
    """Peak memory before training: of loading the model and the first scores."""

    def train(self) -> bool:
        """Train from the last complete checkpoint, if any; return whether the run is over."""
        checkpoint = last_complete(Path(self.trainer.args.output_dir).parent)
        set_seed(self.trainer.args.seed)  # earlier measurements must not change the run's random numbers
        if checkpoint is not None and self._was_last(checkpoint):
            self.trainer._load_from_checkpoint(str(checkpoint))  # calling train here would make one more step
            return True
        self.peak_before_bytes = peak_memory_bytes(self.trainer.model.device)
        reset_peak_memory(self.trainer.model.device)
        with self.interrupt.listening(), without_progress_bars():
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self._is_over(self.trainer.state)

    def _is_over(self, state: TrainerState) -> bool:
        has_stopped = self.watch is not None and self.watch.has_stopped(state)
        return has_stopped or state.global_step >= self.trainer.args.max_steps

    def _was_last(self, checkpoint: Path) -> bool:
        """Whether the run had made all its steps, or had stopped early; if so, restore its history."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not self._is_over(state):
            return False
        self.trainer.state = state
        return True

    def load_best(self) -> str | None:
        """After training with `keep_best`: load the weights with the lowest held-out loss; return a remark on them."""
        state, checkpoints = self.trainer.state, Path(self.trainer.args.output_dir)
        best = best_checkpoint(checkpoints, state) if self.watch else None
        if best is None:
            return None
        folder, loss = best
        step = int(folder.name.rpartition("-")[2])
        if step != state.global_step:
            self.trainer._load_from_checkpoint(str(folder))
        steps = self.trainer.args.max_steps
        early = f"; stopped early, after step {state.global_step}" if state.global_step < steps else ""
        return f"step {step} of {steps}, with the lowest held-out loss of all checkpoints ({loss:.4g}){early}"

    @property
    def history(self) -> list[Point]:
        """The logged points, including those from before a resume."""
        return points(self.trainer.state.log_history)


def build(
    method: Method,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    options: LoopOptions,
    output: Path,
    report: Report,
    run_plan: RunPlan | None = None,
) -> Run:
    """Return the method's trainer for the prepared data; `options` must be complete.

    run_plan: the memory plan; without one, `options.gradient_checkpointing` recomputes all layers or none.
    """
    interrupt = StopOnInterrupt()
    watch = WatchHeldOut(options.early_stopping) if options.keep_best else None
    recomputes = run_plan is None and bool(options.gradient_checkpointing)
    trainer = method.trainer(
        options,
        training_arguments(options, output, has_held_out=data.held_out is not None, recomputes=recomputes),
        model=model,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        callbacks=[
            _tensorboard(output / "tensorboard"),
            MarkComplete(),
            interrupt,
            *([watch] if watch is not None else []),
            *([_tracker(options.report_to)] if options.report_to is not None else []),
        ],
        **({} if run_plan is None else {"use_leaner_plan": run_plan.use_leaner_plan}),
    )
    # with several visible GPUs the trainer would use DataParallel, which the plan does not cover
    trainer.args._n_gpu = 1
    if run_plan is not None:
        run_plan.apply_to(model.get_base_model() if isinstance(model, PeftModel) else model)
    return Run(trainer, report_progress(trainer, report), interrupt, watch)


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """A callback that writes to `folder` whenever it is needed: before, during and after training."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    return callback


def _tracker(name: str) -> TrainerCallback:
    """transformers' callback that sends the metrics to Trackio or Weights & Biases; UserError if it cannot start."""
    callback = INTEGRATION_TO_CALLBACK[name]()
    begin = callback.on_train_begin

    def on_train_begin(*args: Any, **kwargs: Any) -> None:
        try:
            begin(*args, **kwargs)
        except Exception as error:  # such as no login or no network, each with classes of its own
            raise UserError(f"{option('report_to')} {name} cannot start: {reason_of(error)}.") from error

    callback.on_train_begin = on_train_begin
    return callback


def training_arguments(
    options: LoopOptions, output: Path, *, has_held_out: bool, recomputes: bool
) -> dict[str, Any]:
    """Translate fettle's options to arguments that all of TRL's configs take."""
    assert options.max_steps and options.learning_rate and options.batch_size and options.save_steps
    return {
        "output_dir": str(output / CHECKPOINTS),
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": _SCHEDULES[options.schedule],
        "warmup_steps": round(options.warmup_ratio * options.max_steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "gradient_checkpointing": recomputes,
        "eval_strategy": "steps" if has_held_out else "no",
        "eval_steps": options.eval_steps,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        **_checkpoints_to_keep(options),
        "logging_steps": max(1, options.max_steps // 100),
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": options.device == "cpu",
        "bf16": False,  # the weights already have their dtype: no autocast
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "run_name": output.name,
        "disable_tqdm": True,
    }


def _checkpoints_to_keep(options: LoopOptions) -> dict[str, Any]:
    """The last two, so that one is complete while the next is written, and with `keep_best` the best as well."""
    if not options.keep_best:
        return {"save_total_limit": 2}
    return {"save_total_limit": 3, "metric_for_best_model": "loss", "greater_is_better": False}
