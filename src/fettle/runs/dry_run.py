"""A dry run: a few steps on a run's largest batch, in memory; what they take, next to the plan."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import SaveStrategy

from fettle.events import Message
from fettle.files import human_bytes
from fettle.models.progress_bars import without_progress_bars
from fettle.planning.program import peak_memory_bytes, reset_peak_memory
from fettle.planning.report import rounded_seconds
from fettle.runs.job import Job, require_disk
from fettle.runs.memory_plan import largest_batch
from fettle.runs.trainer import build

STEPS = 3
"""The first allocates the optimizer's state, the second may record CUDA graphs, the third is like all that follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a dry run measured on the largest batch: the loss of its first step, the peak memory, and the seconds of a
    step with all its batches."""

    loss: float
    peak_memory_bytes: int
    seconds: float


class _Clock(TrainerCallback):
    """When each step had been logged, for which a GPU has to finish it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())


def try_steps(job: Job) -> DryRun:
    """Train for STEPS steps and report what they took. The job's model is changed, nothing is written.

    Each step is the run's largest batch, for which the memory is planned.
    """
    require_disk(job)
    assert job.options.batch_size and job.options.gradient_accumulation_steps and job.options.max_steps
    sizes = [sum(lengths) for lengths in job.data.train_lengths]
    largest = largest_batch(job.options, sizes)
    data = dataclasses.replace(job.data, train=job.data.train.select(largest), held_out=None)
    options = dataclasses.replace(
        job.options, max_steps=STEPS, gradient_accumulation_steps=1, keep_best=False, report_to=None
    )
    tokens = sum(sizes[index] for index in largest)
    job.report(Message(f"dry run: {STEPS} steps on the largest batch, {tokens:,} tokens each: {job.method}"))
    with TemporaryDirectory() as folder, without_progress_bars():
        run = build(
            job.training, job.model, job.tokenizer, data, options, Path(folder), job.report, job.run_plan
        )
        trainer, clock = run.trainer, _Clock()
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.remove_callback(TensorBoardCallback)
        trainer.add_callback(clock)
        job.begin()
        set_seed(options.seed)
        reset_peak_memory(job.model.device)
        trainer.train()
    found = DryRun(
        loss=trainer.state.log_history[0]["loss"],
        peak_memory_bytes=peak_memory_bytes(job.model.device),
        seconds=(clock.times[STEPS - 1] - clock.times[STEPS - 2]) * job.options.gradient_accumulation_steps,
    )
    for line in _lines(found, job):
        job.report(Message(line))
    return found


def _lines(found: DryRun, job: Job) -> list[str]:
    assert job.options.max_steps
    peak, seconds = human_bytes(found.peak_memory_bytes), rounded_seconds(found.seconds)
    if job.run_plan is not None:
        plan = job.run_plan.plan
        peak = f"{human_bytes(plan.training)} predicted, {peak}"
        seconds = f"{rounded_seconds(plan.seconds)} predicted, {seconds}"
    total = rounded_seconds(found.seconds * job.options.max_steps)
    return [
        f"loss of the first step: {found.loss:.4g}",
        f"peak memory in training: {peak} measured",
        f"time per full step: {seconds} measured; {job.options.max_steps:,} such steps take {total}",
        "nothing was written",
    ]
