"""What a run keeps on disk so that it can resume after Ctrl-C or kill -9, bit for bit.

    my-model/
      run.yaml          every option, resolved; written before the first step
      facts.json        fingerprints of the data and the base weights, the scores before training
      checkpoints/      checkpoint-N: adapter or weights, optimizer, schedule, random state

A checkpoint is used only if it has a `complete` file, which is written after everything else in it and lists the
other files with their hashes, so that a damaged checkpoint is not used. Two are kept, so that there is always a
complete one while the next is being written.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from fettle.checkpoints.folder import command_to_finish
from fettle.errors import UserError, option
from fettle.files import LOCK, describe_folder, only_process, require_new_folder, sha256_of, write_aside
from fettle.options import read
from fettle.runs.defaults import require_tracker
from fettle.runs.measure import Measurement
from fettle.runs.options import LoopOptions

RUN_FILE, FACTS_FILE, CHECKPOINTS, MARK = "run.yaml", "facts.json", "checkpoints", "complete"
REPORT = "report.html"
"""Written last: a run with a report has finished."""

NOT_DECIDING = ("output", "model", "data", "eval_data", "keep_data", "memory", "remeasure", "report_to")

Options = TypeVar("Options", bound=LoopOptions)
START_AGAIN = f"start a new run with another {option('output')}"


class MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete once the trainer has written everything else."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def new_output(output: str) -> str:
    """Return a new run's output folder, with ~ expanded. Raises UserError if the folder is in use."""
    folder = Path(output).expanduser()
    if (command := command_to_finish(folder)) and not (folder / REPORT).exists():
        raise UserError(
            f"{folder} contains an unfinished run; choose another {option('output')}, or resume it with:\n  {command}"
        )
    require_new_folder(folder, "a new run")
    try:
        str(folder).encode()
    except UnicodeError:
        raise UserError(f"{option('output')} {output!r} is not UTF-8 text: choose another name.") from None
    return str(folder)


def options_to_resume(output: Path, kind: type[Options]) -> Options | None:
    """Return the options of the run in `output`, None if it has finished. Raises UserError if there is no run."""
    require_run(output)
    if (output / REPORT).exists():
        if (output / LOCK).exists():  # it was killed after its last file
            with only_process(output):
                pass
        return None
    options = read(kind, output / RUN_FILE)
    now, noted = deciding_options(options), read_facts(output).get("options", {})
    for name in noted:
        if name in now and now[name] != noted[name]:
            raise UserError(
                f"{output / RUN_FILE}: {name} is {now[name]}, and was {noted[name]} when the run started, so the run "
                f"cannot be resumed exactly; undo the change, or {START_AGAIN}."
            )
    require_tracker(options)
    return replace(options, output=str(output))


def deciding_options(options: LoopOptions) -> dict[str, Any]:
    """Return the options that decide what a run ends in. Paths may change: their contents have fingerprints."""
    return {name: value for name, value in asdict(options).items() if name not in NOT_DECIDING}


def require_run(output: Path) -> None:
    """Raise UserError unless `output` holds a run that can be resumed."""
    if not (output / RUN_FILE).exists():
        found = describe_folder(output) if output.is_dir() else "nothing"
        raise UserError(
            f"{output} contains no run to resume (found {found}, expected {RUN_FILE}); "
            f"give the {option('output')} of an interrupted run, or start a new one."
        )


def last_complete(output: Path) -> Path | None:
    """Return the newest complete checkpoint, or None.

    Incomplete ones, left by a killed process, and damaged ones are removed: the run ends in the same bits from an
    earlier checkpoint or from step 1.
    """
    found = [folder for folder in (output / CHECKPOINTS).glob("checkpoint-*") if folder.is_dir()]
    for folder in sorted(found, key=_step, reverse=True):
        if is_complete(folder):
            return folder
        shutil.rmtree(folder)
    return None


def mark_complete(checkpoint: Path) -> None:
    """Mark the checkpoint as complete and record the hashes of its files."""
    with write_aside(checkpoint / MARK, replace=True) as aside:
        aside.write_text(json.dumps(_hashes(checkpoint), indent=2) + "\n", encoding="utf-8")


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of the checkpoint are present and unchanged."""
    try:
        noted = (checkpoint / MARK).read_text(encoding="utf-8")
        # fettle 0.1 wrote an empty file
        return noted == "" or bool(json.loads(noted) == _hashes(checkpoint))
    except (OSError, ValueError):
        return False


def _hashes(checkpoint: Path) -> dict[str, str]:
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != MARK)
    return {file.relative_to(checkpoint).as_posix(): sha256_of([file]) for file in files}


def read_facts(output: Path) -> dict[str, Any]:
    """Return the run's facts so far; empty if it was stopped before any were written.

    Raises UserError if the file is damaged, or missing although there are checkpoints.
    """
    file = output / FACTS_FILE
    if not file.exists():
        if not any((output / CHECKPOINTS).glob("checkpoint-*")):
            return {}
        raise UserError(
            f"{file} is missing, so the data and model of the checkpoints next to it are unknown; "
            f"restore it, or {START_AGAIN}."
        )
    try:
        facts = dict(json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(facts.get("fingerprints", {}), dict):
            raise TypeError("no fingerprints by name")
        if "before" in facts:
            Measurement.from_facts(facts["before"])
        return facts
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged, so the run cannot be resumed exactly; {START_AGAIN}.") from error


def write_facts(output: Path, facts: dict[str, Any]) -> None:
    """Write the run's facts, atomically."""
    with write_aside(output / FACTS_FILE, replace=True) as aside:
        aside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_unchanged(facts: dict[str, Any], now: dict[str, str], options: LoopOptions) -> None:
    """Raise UserError if a fingerprint recorded when the run started differs from `now`. Keys are option names."""
    noted = facts.get("fingerprints", now)
    for name in now:
        if noted.get(name) != now[name]:
            of = "the tokenizer of " if name == "tokenizer" else ""
            source = "model" if name == "tokenizer" else name
            raise UserError(
                f"{of}{option(source)} {getattr(options, source)} has changed since the run started, "
                f"so the run cannot be resumed exactly; restore the original, or {START_AGAIN}."
            )


def _step(folder: Path) -> int:
    step = folder.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1
