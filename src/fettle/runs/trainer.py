"""TRL's SFT trainer, as it is, set up for rows that are already tokenised and packed."""

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
from rich.console import Console
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
from fettle.models.modes import evaluating
from fettle.models.progress_bars import without_progress_bars
from fettle.planning.program import peak_memory_bytes, reset_peak_memory
from fettle.runs.memory_plan import Followed
from fettle.runs.options import LoopOptions
from fettle.runs.progress import (
    Point,
    ProgressCallback,
    points,
    show_progress,
    show_share,
)
from fettle.runs.resume import CHECKPOINTS, MarkComplete, last_complete
from fettle.runs.steps import Trainer

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class StopOnInterrupt(TrainerCallback):
    """Turns Ctrl-C into: finish this step, save a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.is_interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_interrupted:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for Ctrl-C while the block runs (in the main thread, the only one that may)."""
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
    """A trainer ready to go, with what watches over it."""

    trainer: Trainer
    progress: ProgressCallback
    interrupt: StopOnInterrupt
    peak_before_bytes: int = 0
    """The most that was in use before training: what loading and the first scores took."""

    def train(self) -> bool:
        """Train from the last complete checkpoint, if there is one; return whether the run came to its end."""
        checkpoint = last_complete(Path(self.trainer.args.output_dir).parent)
        set_seed(self.trainer.args.seed)  # whatever was measured before must not move the run
        if checkpoint is not None and self._was_last(checkpoint):
            self.trainer._load_from_checkpoint(str(checkpoint))  # to train from here would make one step more
            return True
        self.peak_before_bytes = peak_memory_bytes(self.trainer.model.device)
        reset_peak_memory(self.trainer.model.device)
        with self.progress, self.interrupt.listening(), without_progress_bars():
            self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self.trainer.state.global_step >= self.trainer.state.max_steps

    def _was_last(self, checkpoint: Path) -> bool:
        """Whether the run had made all its steps; if so its history is taken over."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.trainer.args.max_steps:
            return False
        self.trainer.state = state
        return True

    @property
    def history(self) -> list[Point]:
        """What was logged, from before a resume included."""
        return points(self.trainer.state.log_history)

    @torch.no_grad()
    def held_out(self, when: str, console: Console) -> dict[str, float]:
        """Mean loss of the held-out tokens and the share of them predicted rightly; empty where there are none.

        The mean is over tokens, not over batches as in the trainer's own evaluation, so that it does not depend
        on how the rows were packed.
        """
        if self.trainer.eval_dataset is None:
            return {}
        model = self.trainer.model
        loss, right, tokens = 0.0, 0, 0
        batches = self.trainer.get_eval_dataloader()
        what = f"{when}: measuring the loss of the held-out rows"
        with evaluating(model), show_share(what, console) as advance:
            for number, batch in enumerate(batches):
                advance(number / len(batches))
                inputs = self.trainer._prepare_inputs(batch)
                outputs = model(
                    **inputs, use_cache=False, fused_lm_head=True
                )  # TRL's: zero where not trained
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
    console: Console,
    memory: Followed | None = None,
) -> Run:
    """Return TRL's trainer for packs made by `fettle.data.pack`; `options` must be complete.

    memory: the plan in effect; without one `options.gradient_checkpointing` redoes all layers or none.
    """
    interrupt = StopOnInterrupt()
    trainer = Trainer(
        model=model,
        args=sft_config(
            options if memory is None else dataclasses.replace(options, gradient_checkpointing=False),
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
        **({} if memory is None else {"step_leaner": memory.step_leaner}),
    )
    if memory is not None:
        memory.apply_to(model.get_base_model() if isinstance(model, PeftModel) else model)
    return Run(trainer, show_progress(trainer, console), interrupt)


def _tensorboard(folder: Path) -> TensorBoardCallback:
    """A callback that opens its writer in `folder` whenever it needs one, before, in and after training."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(folder)
    return callback


def sft_config(options: LoopOptions, output: Path, *, has_held_out: bool) -> SFTConfig:
    """Fettle's options in TRL's words."""
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
        bf16=False,  # the weights are in their own dtype already: no autocast over them
        dataloader_pin_memory=torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to="none",
        disable_tqdm=True,
    )
    config._n_gpu = 1  # or several GPUs in sight would mean replicas of the model (DataParallel), unplanned
    return config
