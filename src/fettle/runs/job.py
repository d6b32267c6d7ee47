"""The part every kind of training shares: measured, trained, measured, saved, reported."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.adapters.found import remembered_name
from fettle.engine.decode import BATCH_SIZE
from fettle.errors import Interrupted
from fettle.files import only_process, require_free_space, shell_path
from fettle.options import write
from fettle.planning.program import peak_memory_bytes
from fettle.recompute.allocator import release_unused
from fettle.runs import resume
from fettle.runs.measure import Measurement, measure
from fettle.runs.memory_plan import Followed
from fettle.runs.options import PretrainOptions, TrainOptions
from fettle.runs.outcome import Outcome, describe, show_samples
from fettle.runs.report import Sample, write_report
from fettle.runs.rows import Material
from fettle.runs.trainer import Run, build

OVERHEAD_BYTES = 50 * 10**6
"""Room for logs, tokenizer files and the report."""


@dataclass(slots=True, kw_only=True)
class Job:
    """A run with everything chosen.

    options: complete. asked_steps: `--max-steps` as the user gave it. facts: what is known from before a resume.
    begin: called before training, finish: after it, before the scores. save: writes the result into a folder;
    last_file: the file whose presence makes it a result. memory: the plan that the run follows.
    """

    options: TrainOptions | PretrainOptions
    asked_steps: int | None
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    material: Material
    model_name: str
    method: str
    command: str
    facts: dict[str, Any]
    begin: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None
    save: Callable[[Path], None]
    last_file: str
    next_commands: list[str]
    console: Console
    memory: Followed | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.options.output)


def run(job: Job) -> Outcome:
    """Do the job; raise Interrupted after Ctrl-C, UserError where another process works in its folder."""
    _require_disk(job)
    job.output.mkdir(parents=True, exist_ok=True)
    with only_process(job.output):
        _write_run_file(job)
        try:
            return _run(job)
        except KeyboardInterrupt:
            raise _interrupted(job) from None


def _run(job: Job) -> Outcome:
    trainer = build(
        job.model,
        job.tokenizer,
        job.material.train,
        job.material.held_out,
        job.options,
        job.output,
        job.console,
        job.memory,
    )
    is_resumed = "before" in job.facts
    before = _before(job, trainer)
    if is_resumed and resume.last_complete(job.output) is None:
        job.console.print(
            "no checkpoint had been saved yet: training starts at its first step", highlight=False
        )
    show_samples([Sample(a.prompt, a.expected, a.answer, None) for a in before.answers[:3]], job.console)
    job.console.print(f"training {job.options.max_steps} steps: {job.method}", markup=False, highlight=False)
    job.begin()
    if not trainer.train():
        raise _interrupted(job)
    _show_cost(job, trainer)
    job.finish()
    after = _measure(job, trainer, "after training")
    _save(job)
    return _report(job, trainer, before, after)


def _show_cost(job: Job, trainer: Run) -> None:
    """Predicted against measured."""
    if job.memory is None:
        return
    speed = trainer.progress.tokens_per_second
    in_training = peak_memory_bytes(job.model.device)
    for line in job.memory.outcome(_peak_bytes(job, trainer), in_training, speed):
        job.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _peak_bytes(job: Job, trainer: Run) -> int:
    """The most in use so far, as far as the plan counts it: on a GPU in training."""
    in_training = peak_memory_bytes(job.model.device)
    return in_training if job.model.device.type == "cuda" else max(trainer.peak_before_bytes, in_training)


def _write_run_file(job: Job) -> None:
    """Note all options, so that the run can be repeated, and resumed from any folder.

    Steps that follow from --epochs are left open: who repeats the run with other epochs gets other steps.
    """
    changes: dict[str, Any] = {"max_steps": job.asked_steps}
    for name in ("model", "data", "eval_data", "keep_data"):
        source = getattr(job.options, name, None)
        if source is not None:
            changes[name] = remembered_name(source)
    options = dataclasses.replace(job.options, **changes)
    comment = f"Repeat this run: fettle {job.command} --config {resume.RUN_FILE} --output NEW-FOLDER"
    write(options, job.output / resume.RUN_FILE, comment)


def _interrupted(job: Job) -> Interrupted:
    return Interrupted(f"fettle {job.command} --resume --output {shell_path(job.output)}")


def _require_disk(job: Job) -> None:
    """Ask for the room a new run needs; a resumed one has most of it already.

    Two checkpoints are kept while a third is written, each with two moments of AdamW, then the result."""
    if "before" in job.facts:
        return
    trained = sum(p.numel() * p.element_size() for p in job.model.parameters() if p.requires_grad)
    require_free_space(job.output, 10 * trained + OVERHEAD_BYTES, "this run, with its checkpoints,")


def _before(job: Job, trainer: Run) -> Measurement:
    """The scores before training, taken once: a resumed run finds them noted."""
    if "before" not in job.facts:
        job.facts["before"] = _measure(job, trainer, "before training").as_facts()
        job.facts["run_file"] = resume.run_file_digest(job.output)
        resume.write_facts(job.output, job.facts)
    return Measurement.from_facts(job.facts["before"])


def _measure(job: Job, trainer: Run, when: str) -> Measurement:
    held_out = trainer.held_out(when, job.console)
    at_once = BATCH_SIZE if job.memory is None else job.memory.answers_at_once
    asked, kept = job.material.asked, job.material.kept
    found = measure(job.model, job.tokenizer, held_out, asked, kept, job.console, when, at_once=at_once)
    release_unused()  # what this phase had is not to lie between the next one's tensors
    return found


def _save(job: Job) -> None:
    """Put the result into the output folder: written aside, then moved in, the telling file last."""
    aside = job.output / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    job.save(aside)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == job.last_file):
        if file.is_dir():  # a tokenizer's named templates, left by a run that was killed here
            shutil.rmtree(job.output / file.name, ignore_errors=True)
        os.replace(file, job.output / file.name)
    aside.rmdir()


def _report(job: Job, trainer: Run, before: Measurement, after: Measurement) -> Outcome:
    report = describe(
        job.options,
        model_name=job.model_name,
        method=job.method,
        material=job.material,
        history=trainer.history,
        tokens_per_second=trainer.progress.tokens_per_second,
        seconds=time.monotonic() - job.started,
        peak_memory_bytes=max(trainer.peak_before_bytes, peak_memory_bytes(job.model.device)),
        before=before,
        after=after,
        next_commands=job.next_commands,
    )
    write_report(report, job.output / resume.REPORT)
    return Outcome(output=job.output, before=before, after=after, report=report)
