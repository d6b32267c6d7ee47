"""TRL's SFT trainer, set up for rows that are already tokenized and packed."""

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig

from fettle.data import collator
from fettle.events import Report, progress
from fettle.models.modes import evaluating
from fettle.models.progress_bars import without_progress_bars
from fettle.planning.program import peak_memory_bytes, reset_peak_memory
from fettle.runs.memory_plan import RunPlan
from fettle.runs.options import LoopOptions
from fettle.runs.progress import Point, ProgressCallback, points, report_progress
from fettle.runs.resume import CHECKPOINTS, MarkComplete, last_complete
from fettle.runs.steps import Trainer

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

    trainer: Trainer
    progress: ProgressCallback
    interrupt: StopOnInterrupt
    peak_before_bytes: int = 0
    """Peak memory before training: of loading the model and the first scores."""

    def train(self) -> bool:
        """Train from the last complete checkpoint, if any; return whether all steps are done."""
        checkpoint = last_complete(Path(self.trainer.args.output_dir).parent)
        set_seed(self.trainer.args.seed)  # earlier measurements must not change the run's random numbers
        if checkpoint is not None and self._was_last(checkpoint):
            self.trainer._load_from_checkpoint(str(checkpoint))  # calling train here would make one more step
            return True
        self.peak_before_bytes = peak_memory_bytes(self.trainer.model.device)
        reset_peak_memory(self.trainer.model.device)
        with self.interrupt.listening(), without_progress_bars():
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self.trainer.state.global_step >= self.trainer.state.max_steps

    def _was_last(self, checkpoint: Path) -> bool:
        """Whether the run had made all its steps; if so, restore its history."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.trainer.args.max_steps:
            return False
        self.trainer.state = state
        return True

    @property
    def history(self) -> list[Point]:
        """The logged points, including those from before a resume."""
        return points(self.trainer.state.log_history)

    @torch.no_grad()
    def held_out(self, when: str, report: Report) -> dict[str, float]:
        """Mean loss and top-1 accuracy over the held-out tokens; empty if there are none.

        The mean is over tokens, not over batches as in the trainer's own evaluation, so it does not depend on how
        the rows are packed.
        """
        if self.trainer.eval_dataset is None:
            return {}
        model = self.trainer.model
        loss, right, tokens = 0.0, 0, 0
        batches = self.trainer.get_eval_dataloader()
        what = f"{when}: computing the held-out loss"
        with evaluating(model), progress(what, report) as advance:
            for number, batch in enumerate(batches):
                advance(number / len(batches))
                inputs = self.trainer._prepare_inputs(batch)
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                # log_probs is 0 at positions without a label
                loss -= float(outputs.log_probs.double().sum())
                right += int(outputs.is_top1.sum())
                tokens += int(outputs.label_mask.sum())
        return {"loss": loss / max(1, tokens), "token_accuracy": right / max(1, tokens)}


def build(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_packs: Dataset,
    held_out_packs: Dataset | None,
    options: LoopOptions,
    output: Path,
    report: Report,
    run_plan: RunPlan | None = None,
) -> Run:
    """Return TRL's trainer for packs made by `fettle.data.pack`; `options` must be complete.

    run_plan: the memory plan; without one, `options.gradient_checkpointing` recomputes all layers or none.
    """
    interrupt = StopOnInterrupt()
    trainer = Trainer(
        model=model,
        args=sft_config(
            options if run_plan is None else dataclasses.replace(options, gradient_checkpointing=False),
            output,
            has_held_out=held_out_packs is not None,
        ),
        train_dataset=train_packs,
        eval_dataset=held_out_packs,
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
        callbacks=[
            _tensorboard(output / "tensorboard"),
            MarkComplete(),
            interrupt,
        ],
        **({} if run_plan is None else {"use_leaner_plan": run_plan.use_leaner_plan}),
    )
    if run_plan is not None:
        run_plan.apply_to(model.get_base_model() if isinstance(model, PeftModel) else model)
    return Run(trainer, report_progress(trainer, report), interrupt)


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """A callback that writes to `folder` whenever it is needed: before, during and after training."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    return callback


def sft_config(options: LoopOptions, output: Path, *, has_held_out: bool) -> SFTConfig:
    """Translate fettle's options to TRL's."""
    assert options.max_steps and options.learning_rate and options.batch_size and options.save_steps
    config = SFTConfig(
        output_dir=str(output / CHECKPOINTS),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=_SCHEDULES[options.schedule],
        warmup_steps=round(options.warmup_ratio * options.max_steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_checkpointing=bool(options.gradient_checkpointing),
        eval_strategy="steps" if has_held_out else "no",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=max(1, options.max_steps // 100),
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=options.device == "cpu",
        bf16=False,  # the weights already have their dtype: no autocast
        dataloader_pin_memory=torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to="none",
        disable_tqdm=True,
    )
    # with several visible GPUs the trainer would use DataParallel, which the plan does not cover
    config._n_gpu = 1
    return config
