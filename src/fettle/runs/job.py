"""The steps every kind of run shares: score, train, score again, save, report."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.data.named_templates import NAMES
from fettle.engine.text import Engine
from fettle.errors import Interrupted
from fettle.events import Message, Report, Sample
from fettle.files import lasting_name, only_process, require_free_space, shell_path
from fettle.options import write
from fettle.planning.program import peak_memory_bytes
from fettle.recompute.allocator import release_unused
from fettle.runs import resume
from fettle.runs.measure import Measurement, measure
from fettle.runs.memory_plan import RunPlan
from fettle.runs.method import Method
from fettle.runs.options import PretrainOptions, TrainOptions
from fettle.runs.outcome import Outcome, describe
from fettle.runs.report import write_report
from fettle.runs.rows import RunData
from fettle.runs.trainer import Run, build

OVERHEAD_BYTES = 50 * 10**6
"""Disk space for logs, tokenizer files and the report."""


@dataclass(slots=True, kw_only=True)
class Job:
    """A run with all options resolved.

    training: the method; method: its description for the report. options: complete. asked_steps: `max_steps` as the
    user gave it. facts: the contents of facts.json.
    begin: called before training; finish: called after training, before scoring. save: writes the result into a
    folder; last_file: the file that marks the result as complete, moved into place last. run_plan: the memory plan.
    """

    options: TrainOptions | PretrainOptions
    asked_steps: int | None
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    model_name: str
    training: Method
    method: str
    command: str
    facts: dict[str, Any]
    begin: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None
    save: Callable[[Path], None]
    last_file: str
    next_commands: list[str]
    report: Report
    run_plan: RunPlan | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.options.output)


def run(job: Job) -> Outcome:
    """Run the job. Raises Interrupted after Ctrl-C, UserError if another process is using its folder."""
    require_disk(job)
    job.output.mkdir(parents=True, exist_ok=True)
    with only_process(job.output):
        _write_run_file(job)
        try:
            return _run(job)
        except KeyboardInterrupt:
            raise _interrupted(job) from None


def _run(job: Job) -> Outcome:
    trainer = build(
        job.training,
        job.model,
        job.tokenizer,
        job.data,
        job.options,
        job.output,
        job.report,
        job.run_plan,
    )
    is_resumed = "before" in job.facts
    before = _before(job, trainer)
    if is_resumed and resume.last_complete(job.output) is None:
        job.report(Message("no complete checkpoint found: training starts from step 1"))
    for each in before.answers[:3]:
        job.report(Sample(each.prompt, each.expected, each.answer, None))
    job.report(Message(f"training {job.options.max_steps} steps: {job.method}"))
    job.begin()
    if not trainer.train():
        raise _interrupted(job)
    _report_cost(job, trainer)
    if remark := trainer.load_best():
        job.method += f"; {remark}"
        job.report(Message(f"result: {remark}"))
    job.finish()
    after = _measure(job, trainer, "after training")
    _save(job)
    return _report(job, trainer, before, after)


def _report_cost(job: Job, trainer: Run) -> None:
    """Report predicted against measured memory and time."""
    if job.run_plan is None:
        return
    speed = trainer.progress.tokens_per_second
    in_training = peak_memory_bytes(job.model.device)
    for line in job.run_plan.outcome(_peak_bytes(job, trainer), in_training, speed):
        job.report(Message(line))


def _peak_bytes(job: Job, trainer: Run) -> int:
    """The peak memory that the plan predicts: of training on a GPU, of the whole run on a CPU."""
    in_training = peak_memory_bytes(job.model.device)
    return in_training if job.model.device.type == "cuda" else max(trainer.peak_before_bytes, in_training)


def _written_options(job: Job) -> TrainOptions | PretrainOptions:
    """The options as run.yaml has them, so that the run can be repeated, and resumed from any folder.

    `max_steps` is as the user gave it, so that repeating the run with other `epochs` changes the steps.
    """
    changes: dict[str, Any] = {"max_steps": job.asked_steps}
    for name in ("model", "data", "eval_data", "keep_data", "chat_template"):
        source = getattr(job.options, name, None)
        if source is not None and (name != "chat_template" or source not in NAMES):
            changes[name] = lasting_name(source)
    return dataclasses.replace(job.options, **changes)


def _write_run_file(job: Job) -> None:
    comment = f"Repeat this run: fettle {job.command} --config {resume.RUN_FILE} --output NEW-FOLDER"
    write(_written_options(job), job.output / resume.RUN_FILE, comment)


def _interrupted(job: Job) -> Interrupted:
    return Interrupted(f"fettle {job.command} --resume --output {shell_path(job.output)}")


def require_disk(job: Job) -> None:
    """Require the disk space a new run needs; a resumed run already holds most of it.

    Two checkpoints, or three with the best, are kept while another is written, each with AdamW's two moments, plus the
    result.
    """
    if "before" in job.facts:
        return
    trained = sum(p.numel() * p.element_size() for p in job.model.parameters() if p.requires_grad)
    copies = 13 if job.options.keep_best else 10
    require_free_space(job.output, copies * trained + OVERHEAD_BYTES, "this run, with its checkpoints,")


def _before(job: Job, trainer: Run) -> Measurement:
    """The scores before training, measured once: a resumed run reads them from facts.json."""
    if "before" not in job.facts:
        job.facts["before"] = _measure(job, trainer, "before training").as_facts()
        job.facts["options"] = resume.deciding_options(_written_options(job))
        resume.write_facts(job.output, job.facts)
    return Measurement.from_facts(job.facts["before"])


def _measure(job: Job, trainer: Run, when: str) -> Measurement:
    held_out = job.training.held_out(trainer.trainer, when, job.report)
    memory = {} if job.run_plan is None else job.run_plan.engine_memory
    measurement = measure(
        Engine(job.model, job.tokenizer, **memory),
        held_out,
        job.data.held_out_questions,
        job.data.keep_questions,
        job.report,
        when,
    )
    release_unused()  # so that this phase's memory does not fragment the next one's
    return measurement


def _save(job: Job) -> None:
    """Save the result: write it to a temporary folder, then move the files into the output, `last_file` last."""
    aside = job.output / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    job.save(aside)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == job.last_file):
        if file.is_dir():  # a tokenizer's named templates; a run killed here may have left some
            shutil.rmtree(job.output / file.name, ignore_errors=True)
        os.replace(file, job.output / file.name)
    aside.rmdir()


def _report(job: Job, trainer: Run, before: Measurement, after: Measurement) -> Outcome:
    report = describe(
        job.options,
        model_name=job.model_name,
        method=job.method,
        data=job.data,
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
