"""Files that are there whole or not at all.

A run that is interrupted must leave nothing half-written, and a run that cannot end well must say so before
it starts. Everything fettle writes therefore goes to a temporary name beside its target and is renamed onto
it as the last step (a rename inside one folder is atomic), and every job first asks whether its output
folder is free and the disk is large enough.

Sizes are decimal, as disks and model pages count them: 1 GB is 10^9 bytes.
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from fettle.errors import UserError

# What a folder holds, told by the first of these names found in it.
_SIGNS = (
    ("run.yaml", "another run"),
    ("checkpoint-*", "a training run"),
    ("adapter_config.json", "an adapter"),
    ("*.safetensors", "a model's weights"),
    ("config.json", "a model"),
)

# What a folder with a full model may hold: what fettle, transformers and a model page put there.
_MODEL_FILES = (
    *("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    *("README.md", "LICENSE*", ".gitattributes"),
)


_NAMED_TEMPLATES = "additional_chat_templates"
"""Where transformers keeps a model's chat templates other than the default one, as .jinja files."""

LOCK = ".lock"
"""The file that `only_process` locks; it stays behind where its process is killed."""


@contextmanager
def write_aside(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it onto `path` when the block succeeds.

    The caller makes a file or a folder at the yielded path. On any failure, Ctrl-C included, it is removed.
    What a killed process left behind for the same target is removed first.

    With `replace`, an existing file is replaced, that which a link points to; without, `path` must be absent or an
    empty folder. Raises UserError before the block runs where `path` cannot be written.
    """
    path = Path(path).resolve() if replace else Path(path)
    _put_back(path)
    _require_replaceable(path, replace)
    _make_parent(path)
    _remove_abandoned(path)
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    _remove(aside)
    try:
        yield aside
        _require_replaceable(path, replace)  # again: it may have appeared while the block ran
        if path.is_dir():
            _remove_leftovers(path)
        os.replace(aside, path)
    finally:
        _remove(aside)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to make a model's folder at; it takes the place of the one at `path`, if any.

    The old folder stays until the new one is whole. It is renamed before that takes its name, and deleted last: a
    process that is killed in between leaves it beside `path`, and the next one puts it back.
    Raises UserError where `path` is anything but the folder of a model.
    """
    path = Path(path).resolve()
    _put_back(path)
    if not _is_occupied(path):
        with write_aside(path) as aside:
            yield aside
        return
    _require_model(path)
    _require_writable(path.parent)
    _remove_abandoned(path)
    aside, old = (path.with_name(f".{kind}-{os.getpid()}-{path.name}") for kind in ("partial", "replaced"))
    try:
        yield aside
        _require_model(path)  # again: something may have been laid there while the block ran
        os.rename(path, old)
        try:
            os.rename(aside, path)
        except BaseException:
            os.rename(old, path)
            raise
        _remove(old)
    finally:
        _remove(aside)


def require_new_folder(path: Path, what: str, *, replace: bool = False) -> None:
    """Raise UserError unless `path`, where `what` is to go, is absent or an empty folder.

    With `replace` it may be the folder of a model, as `replace_folder` takes it.
    """
    path = Path(path)
    _put_back(path)
    if replace and _is_occupied(path):
        _require_model(path)
    elif _is_occupied(path):
        raise UserError(
            f"{path} already holds {describe_folder(path)}, and {what} needs a new or empty folder: "
            f"name another one, or move {path} away."
        )
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} is a file, and {what} needs a folder: name another one.")
    _require_writable(path)


def require_new_file(path: Path, *, replace: bool = False) -> None:
    """Raise UserError unless `path` can become a file: it is absent or, with `replace`, one already."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file is to be written: name another one.")
    if os.path.lexists(path) and not replace:
        raise UserError(f"{path} is already there: name another file, or give --overwrite.")
    _require_writable(path.resolve())


def _is_occupied(path: Path) -> bool:
    """Whether `path` is a folder that holds more than what a killed process left of its first steps."""
    return path.is_dir() and any(not _is_leftover(entry) for entry in path.iterdir())


def _require_model(path: Path) -> None:
    """Raise UserError unless the folder holds a full model and nothing that is no part of one."""
    foreign = sorted(entry.name for entry in path.iterdir() if not _is_part_of_model(entry))
    if foreign or not (path / "config.json").exists() or not any(path.glob("*.safetensors")):
        found = f"{foreign[0]!r} in it is none of a model's files" if foreign else "it holds no whole model"
        raise UserError(f"{path} is not replaced, as {found}: name another folder, or move this one away.")


def _is_part_of_model(entry: Path) -> bool:
    if entry.name == _NAMED_TEMPLATES and entry.is_dir():
        return all(each.is_file() and each.suffix == ".jinja" for each in entry.iterdir())
    return entry.is_file() and any(fnmatch(entry.name, each) for each in _MODEL_FILES)


def _put_back(path: Path) -> None:
    """What a killed process had renamed to make room gets its name back, or goes where the new folder is there."""
    is_readable = path.parent.is_dir() and os.access(path.parent, os.R_OK | os.X_OK)
    for entry in sorted(path.parent.iterdir()) if is_readable else ():
        if _is_abandoned(entry, "replaced", path.name):
            if os.path.lexists(path):
                _remove(entry)
            else:
                os.rename(entry, path)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process while the block runs; raise UserError where another one holds it.

    The system lets go of it when the process ends, however it ends. Where it cannot lock files, nothing is held.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = folder / LOCK
    try:
        lock_file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): remove it.") from error
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {folder}: wait until it has ended, or choose another folder."
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def describe_folder(path: Path) -> str:
    """Say in a few words what a folder holds, the leftovers of a killed process aside."""
    for pattern, meaning in _SIGNS:
        if found := sorted(path.glob(pattern)):
            return f"{meaning} ({found[0].name})"
    names = sorted(entry.name for entry in path.iterdir() if not _is_leftover(entry))
    if not names:
        return "nothing"
    return f"{names[0]!r} and {len(names) - 1} more" if len(names) > 1 else repr(names[0])


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError where the disk that is to hold `path` has less than `needed_bytes` free for `what`."""
    place = _nearest_folder(Path(path).resolve())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{what} needs {human_bytes(needed_bytes)} of disk, but only {human_bytes(free_bytes)} is free "
            f"at {place.absolute()}: free some space there, or choose a folder on another disk."
        )


def sibling(path: Path, ending: str) -> Path:
    """Return the path next to `path` whose name is longer by `ending`, also for a path such as `.` or `run/..`."""
    if path.name in ("", ".."):
        path = path.resolve()
    return path.with_name(path.name + ending)


def shell_path(path: str | Path) -> str:
    """Return `path` as a word to type in a shell, which a command takes for no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def human_bytes(count: int | float) -> str:
    """Write a number of bytes with a unit and three or four figures: 512 B, 1.5 kB, 7.64 GB."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    power = 1
    while abs(count) >= 999.95 * 1000**power and power < 4:
        power += 1
    count, unit = count / 1000**power, ("kB", "MB", "GB", "TB")[power - 1]
    return f"{count:.2f} {unit}" if abs(count) < 9.995 else f"{count:.1f} {unit}"


def sha256_of(files: Iterable[Path]) -> str:
    """Return the SHA-256, in hex, of the contents of `files` in the order given; their names do not count."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            # Hashing each file by itself keeps ["ab", "c"] apart from ["a", "bc"].
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _require_replaceable(path: Path, replace: bool) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        if _is_occupied(path):
            raise UserError(
                f"{path} already holds {describe_folder(path)}: name another folder, or move it away."
            )
    elif not replace:
        raise UserError(f"{path} is already there: name another file, or move it away.")


def _make_parent(path: Path) -> None:
    _require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _require_writable(path: Path) -> None:
    place = _nearest_folder(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {place.absolute()} is read-only for this user.")


def _nearest_folder(path: Path) -> Path:
    """Return `path` or the closest folder above it that exists; a file on the way raises UserError."""
    for place in (path, *path.parents):
        if place.is_dir():
            return place
        if place != path and os.path.lexists(place):
            raise UserError(f"{path} cannot be written: {place} is a file, not a folder.")
    return Path(path.anchor or ".")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove what a process that no longer runs (kill -9, power cut) left beside `path` for `path`."""
    for entry in path.parent.iterdir():
        if _is_abandoned(entry, "partial", path.name):
            _remove(entry)


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if _is_leftover(entry):
            _remove(entry)


def _is_leftover(entry: Path) -> bool:
    """Whether a killed process left it in the folder of its run: its lock, or a file that it was still writing."""
    return entry.name == LOCK or _is_abandoned(entry, "partial")


def _is_abandoned(entry: Path, kind: str, target: str | None = None) -> bool:
    """Whether it was set aside, for `target` or for any, by a process that no longer runs.

    The number of this process itself counts as another's: in a container every run is process 1, and callers look
    before they set anything aside.
    """
    match = re.fullmatch(rf"\.{kind}-(\d+)-(.+)", entry.name, re.DOTALL)
    if match is None or target not in (None, match[2]):
        return False
    process_id = int(match[1])
    return process_id == os.getpid() or not _is_running(process_id)


def _is_running(process_id: int) -> bool:
    with suppress(PermissionError):  # it runs, under another user
        try:
            os.kill(process_id, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True
