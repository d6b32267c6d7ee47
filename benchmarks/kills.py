"""Kill fettle with SIGKILL at random moments and check that nothing is lost.

    python benchmarks/kills.py --kills 50 --seed 0 --only train,export-gguf

Every kill comes at a moment drawn uniformly from the duration of an uninterrupted command, so that imports, reading,
planning, scoring, training, saving and reporting are all hit. A killed run is resumed (`--resume`; where the kill came
before there was a run, the same command again), now and then killed once more, and must end in the same bits as the
uninterrupted one, with no leftover files and its input files unchanged. After the kill of an export its target is
absent or whole (with --overwrite: the old or the new one, or the old one set aside, which the next export puts back),
and the same command then writes the same bytes.

Prints a table; exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from fettle.files import sha256_of

STEPS = 8
AGAIN = 0.35
"""The probability that a resumed run is killed too."""
MOST_KILLS_OF_A_RUN = 4
FRESH = 0.2
"""The share of commands that are new interpreters, and so may be hit while they import. The others are forks of
this process, which has everything imported: on a busy machine imports take longer than the rest."""
AIMED = 0.5
"""The share of an export's kills that come while it writes; it reads and imports for much longer."""
WRITING_SECONDS = 0.15
LONGEST_SECONDS = 600
LEFTOVERS = re.compile(r"\.partial-|\.replaced-|\.saving$|\.lock$|^tmp|\.tmp$|^shard-")
NOT_COMPARED = {"run.yaml", "report.html"}
"""They name the output folder and the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command to kill: its words, for an output path that ends in `suffix`."""

    words: Callable[[Path], list[str]]
    resume: str | None = None
    """For a run, the command whose --resume goes on with it; None for an export."""
    suffix: str = ""
    overwrites: bool = False


@dataclass(slots=True)
class Tally:
    """What happened to one case."""

    kills: int = 0
    places: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Of an uninterrupted command, without its imports."""
    import_seconds: float = 0.0


def cases(material: Path) -> dict[str, Case]:
    """What is killed, by name."""
    model, rows, old = material / "model", material / "rows.jsonl", material / "old.jsonl"
    loop = ["--max-steps", str(STEPS), "--save-steps", "2", "--samples", "2", "--device", "cpu"]
    train = ["train", "--model", str(model), "--data", str(rows), *loop, "--dropout", "0.1"]
    sizes = [
        "--vocab-size",
        "350",
        "--hidden-size",
        "32",
        "--intermediate-size",
        "64",
        "--layers",
        "2",
        "--heads",
        "2",
    ]
    export = ["export", "--model", str(material / "adapter"), "--format"]

    def to(words: list[str], option: str = "--output") -> Callable[[Path], list[str]]:
        return lambda output: [*words, option, str(output)]

    gguf = [*export, "gguf", "--quantization", "q8_0", "--ollama"]
    return {
        "train": Case(words=to([*train, "--eval-steps", "3", "--eval-fraction", "0.1"]), resume="train"),
        "train-no-heldout": Case(words=to([*train, "--eval-fraction", "0"]), resume="train"),
        "train-keep-data": Case(words=to([*train, "--no-packing", "--keep-data", str(old)]), resume="train"),
        "pretrain": Case(
            words=to(["pretrain", "--data", str(rows), *loop, *sizes, "--context", "256"]), resume="pretrain"
        ),
        "export-folder": Case(words=to([*export, "safetensors"], "--to")),
        "export-folder-overwrite": Case(
            words=to([*export, "safetensors", "--overwrite"], "--to"), overwrites=True
        ),
        "export-gguf": Case(words=to(gguf, "--to"), suffix=".gguf"),
        "export-gguf-overwrite": Case(
            words=to([*gguf, "--overwrite"], "--to"), suffix=".gguf", overwrites=True
        ),
    }


def make_material(folder: Path) -> None:
    """A small checkpoint, its rows and an adapter on disk."""
    import torch

    from fettle.methods.pretrain import new_model
    from fettle.models.save import save_model
    from fettle.runs.options import PretrainOptions
    from fettle.tiny.lessons import lessons
    from fettle.tiny.tokenizer import train_tokenizer

    rows = list(lessons(150, seed=3, split="train"))
    folder.mkdir()
    for name, some in (("rows.jsonl", rows), ("old.jsonl", rows[:6])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row["messages"]], 350)
    torch.manual_seed(0)
    sizes = PretrainOptions(
        data="", output="", hidden_size=64, intermediate_size=96, layers=2, heads=2, context=256
    )
    save_model(new_model(sizes, tokenizer), tokenizer, folder / "model")


def import_everything() -> float:
    """Import what the commands import; return the seconds that takes."""
    began = time.monotonic()
    from fettle.cli import quiet_libraries

    quiet_libraries()

    return time.monotonic() - began


class Process:
    """fettle at work on some words, its output in `log`: a new interpreter, or a fork that has the imports already."""

    def __init__(self, words: list[str], log: Path, *, is_fresh: bool) -> None:
        self.code: int | None = None
        with log.open("ab") as stream:
            if is_fresh:
                line = [sys.executable, "-m", "fettle", *words]
                self.pid = subprocess.Popen(line, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL).pid
            elif (pid := os.fork()) == 0:
                self._work(words, stream.fileno())
            else:
                self.pid = pid

    def _work(self, words: list[str], output: int) -> NoReturn:
        from fettle.cli import main

        code = 1
        try:
            for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
                os.dup2(file, number)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # lines at once, to see how far it came
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, None if it is still running after so many seconds."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                break
            else:
                time.sleep(0.002)
        return self.code

    def kill(self) -> None:
        """End this process alone, as the kernel's out-of-memory killer does."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def run(words: list[str], log: Path, *, is_fresh: bool = False) -> tuple[int, float]:
    """Run a command to its end; return its exit code and seconds."""
    began = time.monotonic()
    code = Process(words, log, is_fresh=is_fresh).wait(LONGEST_SECONDS)
    if code is None:
        raise RuntimeError(f"{words} still runs after {LONGEST_SECONDS} s")
    return code, time.monotonic() - began


def run_killed(
    words: list[str], log: Path, rng: random.Random, tally: "Tally", writes_in: Path | None = None
) -> int | None:
    """Run a command and kill it at a random moment; return its exit code if it has ended before, else None.

    writes_in: where an export sets its files aside; half of its kills are aimed at the short time in which it does.
    """
    is_fresh, began = rng.random() < FRESH, time.monotonic()
    process = Process(words, log, is_fresh=is_fresh)
    if writes_in is not None and rng.random() < AIMED:
        while process.wait(0) is None and not any(writes_in.glob(".[pr]*-*")):
            pass
        code = process.wait(rng.uniform(0, WRITING_SECONDS))
    else:
        code = process.wait(rng.uniform(0, tally.seconds + is_fresh * tally.import_seconds))
    if code is None:
        process.kill()
    elif not is_fresh:  # the machine has become less busy
        tally.seconds = min(tally.seconds, time.monotonic() - began)
    return code


def contents(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of every file in a folder, by name."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path.parent if path.is_file() else path)): sha256_of([file]) for file in files
    }


def result_of(output: Path) -> dict[str, str]:
    """What a run leaves in the top of its folder and what must be the same in the same bits."""
    found = contents(output)
    return {name: value for name, value in found.items() if "/" not in name and name not in NOT_COMPARED}


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if LEFTOVERS.search(path.name)]


def place_of(log: Path, target: Path) -> str:
    """Where a kill hit a run, told by what it had printed and written."""
    text = log.read_text(errors="replace")
    if (target / "report.html").exists():
        return "after the report"
    if (target / "adapter_config.json").exists() or (target / "config.json").exists():
        return "writing the report"
    if not text.strip():
        return "importing, reading"
    for sign, place in (
        (rf"step {STEPS}/{STEPS}\b.*done", "scoring after, saving"),
        ("training [0-9]+ steps", "training"),
        ("before training", "scoring before"),
        ("measuring the speed|memory on", "planning, loading"),
    ):
        if re.search(sign, text):
            return place
    return "reading"


def try_run(
    case: Case, expected: dict[str, str], folder: Path, rng: random.Random, tally: Tally
) -> Iterator[str]:
    """Kill a run, now and then several times, and finish it; yield what is wrong."""
    output, words, code = folder / "my run", case.words(folder / "my run"), None
    resume = [str(case.resume), "--resume", "--output", str(output)]
    for attempt in range(MOST_KILLS_OF_A_RUN + 1):
        log = folder / f"log-{attempt}"
        if attempt and (output / "run.yaml").exists():
            words = resume
        elif attempt == 1:  # killed before there was a run
            yield from no_run_to_resume(resume, folder / "log-refused")
        if attempt == MOST_KILLS_OF_A_RUN or (attempt and rng.random() > AGAIN):
            code, _ = run(words, log, is_fresh=rng.random() < FRESH)
        else:
            code = run_killed(words, log, rng, tally)
        if code is not None:
            break
        tally.kills += 1
        tally.places[place_of(log, output)] += 1
    if code:
        yield f"ended with exit code {code}: {log.read_text()[-500:]}"
    if (found := result_of(output)) != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        yield f"differs from the uninterrupted run in {', '.join(names)}"
    if not (output / "report.html").exists():
        yield "has no report"
    if stray := leftovers(output):
        yield f"leftovers: {', '.join(stray)}"


def no_run_to_resume(words: list[str], log: Path) -> Iterator[str]:
    """Where nothing can be resumed, --resume says so and what to do."""
    code, _ = run(words, log)
    said = log.read_text()
    if code != 2 or "contains no run to resume" not in said or "or start a new one" not in said:
        yield f"--resume without a run ended with exit code {code}: {said[-300:]}"


def try_export(
    case: Case, expected: dict[str, str], folder: Path, rng: random.Random, tally: Tally
) -> Iterator[str]:
    """Kill an export, look at what is there, and run it again; yield what is wrong."""
    target = folder / f"my model{case.suffix}"
    old: dict[str, str] = {}
    if case.overwrites:
        source = folder.parent / f"old{case.suffix}"
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        old = contents(target)
    if run_killed(case.words(target), folder / "log-0", rng, tally, folder) is None:
        tally.kills += 1
        has_begun = any(path.name.startswith((".partial", ".replaced")) for path in folder.iterdir())
        is_written = target.exists() and contents(target) != old
        tally.places["written" if is_written else "writing" if has_begun else "before writing"] += 1
    if target.exists():
        if (found := contents(target)) not in (old, expected):
            yield f"after the kill it is neither old nor new: {sorted(found)}"
    elif old and old not in [contents(path) for path in folder.glob(".replaced-*")]:
        yield "the old one is lost"
    is_whole = target.exists() and contents(target) != old
    log = folder / "log-1"
    code, _ = run(case.words(target), log, is_fresh=rng.random() < FRESH)
    is_refused = code == 2 and "already" in log.read_text() and not case.overwrites
    if code and not (is_refused and is_whole):
        yield f"the second export ended with exit code {code}: {log.read_text()[-500:]}"
    if contents(target) != expected:
        yield "the second export differs from the uninterrupted one"
    if stray := leftovers(folder):
        yield f"leftovers: {', '.join(stray)}"


def main() -> int:
    """Make the material, run everything once without a kill, then kill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of cases, with commas; the beginning of a name is enough")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
    root = options.keep or Path(tempfile.mkdtemp(prefix="fettle-kills-"))
    root.mkdir(parents=True, exist_ok=options.keep is None)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        return kill_all(root, options.kills, options.seed, options.only)
    finally:
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)


def kill_all(root: Path, kills: int, seed: int, only: str | None) -> int:
    """Kill `kills` times in all, the cases taking turns; print the table and return the exit code."""
    material = root / "material"
    import_seconds = import_everything()
    make_material(material)
    every = cases(material)
    chosen = [name for name in every if only is None or name.startswith(tuple(only.split(",")))]
    print(f"{len(chosen)} cases in {root}", flush=True)
    whole: dict[str, dict[str, str]] = {}
    tallies = {name: Tally(import_seconds=import_seconds) for name in chosen}
    first = every["train"]
    code, _ = run([*first.words(material / "adapter")], root / "adapter.log")
    assert code == 0, (root / "adapter.log").read_text()
    inputs = contents(material)
    for name in chosen:
        case, folder = every[name], root / name
        folder.mkdir()
        target = folder / f"whole{case.suffix}"
        words = case.words(target)
        code, tallies[name].seconds = run(words, folder / "whole.log")
        assert code == 0, (folder / "whole.log").read_text()
        whole[name] = result_of(target) if case.resume else contents(target)
        if case.overwrites:  # an older model: the base itself, exported
            old = [str(material / "model") if word == str(material / "adapter") else word for word in words]
            old[-1] = str(folder / f"old{case.suffix}")
            code, _ = run(old, folder / "old.log")
            assert code == 0, (folder / "old.log").read_text()
        print(f"{name}: {tallies[name].seconds:.1f} s without a kill", flush=True)
    rng, trial = random.Random(seed), 0
    while sum(tally.kills for tally in tallies.values()) < kills:
        name = chosen[trial % len(chosen)]
        case, tally, folder = every[name], tallies[name], root / name / f"trial-{trial}"
        folder.mkdir()
        judge = try_run if case.resume else try_export
        wanted = (
            {f"my model{case.suffix}": each for each in whole[name].values()} if case.suffix else whole[name]
        )
        faults = list(judge(case, wanted, folder, rng, tally))
        if contents(material) != inputs:
            faults.append("its input files have changed")
        tally.faults += [f"trial {trial}: {fault}" for fault in faults]
        print(f"{name} {trial}: {'; '.join(faults) or 'ok'} {dict(tally.places)}", flush=True)
        if not faults:
            shutil.rmtree(folder)
        trial += 1
    return show(tallies)


def show(tallies: dict[str, Tally]) -> int:
    """Print what was killed where; 1 if anything was lost."""
    table = Table("what", "seconds", "kills", "where they hit", "result")
    for name, tally in tallies.items():
        places = ", ".join(f"{count} {place}" for place, count in tally.places.most_common())
        result = "\n".join(tally.faults) or "nothing lost"
        table.add_row(name, f"{tally.seconds:.1f}", str(tally.kills), places, result)
    Console(width=140).print(table)
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
