"""Atomic writes, and checks of the output location before a job starts.

An interrupted run must leave no half-written files, and a run that cannot succeed must fail before it starts.
fettle therefore writes everything under a temporary name next to the target and renames it at the end (a rename
within one folder is atomic), and every job first checks that its output folder is free and the disk has space.

Sizes are decimal: 1 GB is 10^9 bytes.
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

from fettle.errors import UserError, option

# What a folder contains: the first of these names found in it decides.
_SIGNS = (
    ("run.yaml", "another run"),
    ("checkpoint-*", "a training run"),
    ("adapter_config.json", "an adapter"),
    ("*.safetensors", "a model's weights"),
    ("config.json", "a model"),
)

# Files that fettle, transformers and the Hub put into the folder of a full model.
_MODEL_FILES = (
    *("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    *("README.md", "LICENSE*", ".gitattributes"),
)


_NAMED_TEMPLATES = "additional_chat_templates"
"""The folder of a model's chat templates other than the default one, as .jinja files (a transformers convention)."""

LOCK = ".lock"
"""The file that `only_process` locks; a killed process leaves it behind."""


@contextmanager
def write_aside(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it onto `path` when the block succeeds.

    The caller creates a file or a folder at the yielded path. On any failure, including Ctrl-C, it is removed.
    Leftovers of a killed process for the same target are removed first.

    With `replace`, an existing file is replaced (the target of a link, not the link); without, `path` must be absent
    or an empty folder. Raises UserError before the block runs if `path` cannot be written.
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
    """Yield a temporary sibling for a new model folder, which then replaces the one at `path`, if any.

    The old folder is kept until the new one is complete. It is renamed, the new one takes its name, and it is deleted
    last. If the process is killed in between, the old folder remains next to `path` and the next call restores it.
    Raises UserError if `path` is anything but the folder of a model.
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
        _require_model(path)  # again: a file may have appeared while the block ran
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
    """Raise UserError unless `path`, the destination of `what`, is absent or an empty folder.

    With `replace` it may be the folder of a model, as `replace_folder` takes it.
    """
    path = Path(path)
    _put_back(path)
    if replace and _is_occupied(path):
        _require_model(path)
    elif _is_occupied(path):
        raise UserError(
            f"{path} already contains {describe_folder(path)}, but {what} needs a new or empty folder: "
            f"choose another folder, or move {path} away."
        )
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} is a file, but {what} needs a folder: choose another path.")
    _require_writable(path)


def require_new_file(path: Path, *, replace: bool = False) -> None:
    """Raise UserError unless a file can be created at `path`: it is absent or, with `replace`, a file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, but the output is a file: choose another path.")
    if os.path.lexists(path) and not replace:
        raise UserError(f"{path} already exists: choose another file, or pass {option('overwrite')}.")
    _require_writable(path.resolve())


def _is_occupied(path: Path) -> bool:
    """Whether `path` is a folder that contains anything but the leftovers of a killed process."""
    return path.is_dir() and any(not _is_leftover(entry) for entry in path.iterdir())


def _require_model(path: Path) -> None:
    """Raise UserError unless the folder contains a full model and nothing else."""
    foreign = sorted(entry.name for entry in path.iterdir() if not _is_part_of_model(entry))
    if foreign or not (path / "config.json").exists() or not any(path.glob("*.safetensors")):
        found = (
            f"contains {foreign[0]!r}, which is not a model file" if foreign else "is not a complete model"
        )
        raise UserError(f"{path} was not replaced: it {found}; choose another folder, or move this one away.")


def _is_part_of_model(entry: Path) -> bool:
    if entry.name == _NAMED_TEMPLATES and entry.is_dir():
        return all(each.is_file() and each.suffix == ".jinja" for each in entry.iterdir())
    return entry.is_file() and any(fnmatch(entry.name, each) for each in _MODEL_FILES)


def _put_back(path: Path) -> None:
    """Restore the name of a folder that a killed process had renamed, or delete it if its replacement exists."""
    is_readable = path.parent.is_dir() and os.access(path.parent, os.R_OK | os.X_OK)
    for entry in sorted(path.parent.iterdir()) if is_readable else ():
        if _is_abandoned(entry, "replaced", path.name):
            if os.path.lexists(path):
                _remove(entry)
            else:
                os.rename(entry, path)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process while the block runs; raise UserError if another process has locked it.

    The system releases the lock when the process ends, however it ends. On Windows nothing is locked.
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
                f"another process is using {folder}: wait until it ends, or choose another folder."
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def describe_folder(path: Path) -> str:
    """Describe in a few words what a folder contains, ignoring the leftovers of a killed process."""
    for pattern, meaning in _SIGNS:
        if found := sorted(path.glob(pattern)):
            return f"{meaning} ({found[0].name})"
    names = sorted(entry.name for entry in path.iterdir() if not _is_leftover(entry))
    if not names:
        return "nothing"
    return f"{names[0]!r} and {len(names) - 1} more" if len(names) > 1 else repr(names[0])


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError if the disk of `path` has less than `needed_bytes` free for `what`."""
    place = _nearest_folder(Path(path).resolve())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{what} needs {human_bytes(needed_bytes)} of disk, but only {human_bytes(free_bytes)} is free "
            f"at {place.absolute()}: free some space there, or choose a folder on another disk."
        )


def sibling(path: Path, ending: str) -> Path:
    """Return the path next to `path` with `ending` appended to its name, also for a path such as `.` or `run/..`."""
    if path.name in ("", ".."):
        path = path.resolve()
    return path.with_name(path.name + ending)


def lasting_name(name: str) -> str:
    """Return the name to store in a run or an adapter: the absolute path if it exists, a hub name unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def shell_path(path: str | Path) -> str:
    """Return `path` quoted for a shell, in a form that a command does not parse as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def human_bytes(count: int | float) -> str:
    """Format a number of bytes with a unit and three or four digits: 512 B, 1.50 kB, 7.64 GB."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    power = 1
    while abs(count) >= 999.95 * 1000**power and power < 4:
        power += 1
    count, unit = count / 1000**power, ("kB", "MB", "GB", "TB")[power - 1]
    return f"{count:.2f} {unit}" if abs(count) < 9.995 else f"{count:.1f} {unit}"


def sha256_of(files: Iterable[Path]) -> str:
    """Return the SHA-256, in hex, of the contents of `files` in the given order; names are ignored."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            # Hashing each file separately keeps ["ab", "c"] apart from ["a", "bc"].
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _require_replaceable(path: Path, replace: bool) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        if _is_occupied(path):
            raise UserError(
                f"{path} already contains {describe_folder(path)}: choose another folder, or move it away."
            )
    elif not replace:
        raise UserError(f"{path} already exists: choose another file, or move it away.")


def _make_parent(path: Path) -> None:
    _require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _require_writable(path: Path) -> None:
    place = _nearest_folder(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {place.absolute()} is read-only for this user.")


def _nearest_folder(path: Path) -> Path:
    """Return `path` or its nearest existing parent folder. Raises UserError if a parent is a file."""
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
    """Remove temporary siblings of `path` left by a process that no longer runs (kill -9, power cut)."""
    for entry in path.parent.iterdir():
        if _is_abandoned(entry, "partial", path.name):
            _remove(entry)


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if _is_leftover(entry):
            _remove(entry)


def _is_leftover(entry: Path) -> bool:
    """Whether a killed process left it in its folder: the lock, or a partial file."""
    return entry.name == LOCK or _is_abandoned(entry, "partial")


def _is_abandoned(entry: Path, kind: str, target: str | None = None) -> bool:
    """Whether it is a temporary sibling, of `target` or of any path, made by a process that no longer runs.

    This process's own id counts as another's: in a container every run is process 1, and callers check before
    they create any temporary file.
    """
    match = re.fullmatch(rf"\.{kind}-(\d+)-(.+)", entry.name, re.DOTALL)
    if match is None or target not in (None, match[2]):
        return False
    process_id = int(match[1])
    return process_id == os.getpid() or not _is_running(process_id)


def _is_running(process_id: int) -> bool:
    with suppress(PermissionError):  # it runs as another user
        try:
            os.kill(process_id, 0)
        except (ProcessLookupError, OverflowError):
            return False
    return True
