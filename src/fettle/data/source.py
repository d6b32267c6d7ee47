"""Which files of a folder are training data.

A folder may be a plain folder, a clone of a hub dataset, or the output of `save_to_disk` of the `datasets` library.
If its dataset card, its state files or its file names say which rows are for testing, only the train split is read,
and a note lists what was left out: test rows must not be trained on by accident.  A folder with only test rows is
refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fettle.data.values import load_json, printable
from fettle.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".arrow")
EXTENSIONS = ", ".join(SUFFIXES)
TRAIN = "train"

_NOT_ROWS = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow|(readme|licen[cs]e|notice|requirements).*\.txt",
    re.I,
)
# As the `datasets` library names splits: a word of the path, or the part of a shard's name before its number.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_PART = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_CARD_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.S | re.M)


@dataclass(frozen=True, slots=True)
class Files:
    """Files to read, each with the name that messages use for it, and notes about the choice of files."""

    files: list[tuple[Path, str]]
    notes: list[str]


def data_files(source: Path) -> Files:
    """Return the files to read. Raises `UserError` if there are none, or no train split among several splits."""
    try:
        if source.is_dir():
            return _folder(source)
        is_there = source.exists()
    except OSError as error:
        raise UserError(f"{path_name(source)}: cannot be read ({error.strerror}).") from None
    if not is_there:
        raise UserError(
            f"{path_name(source)}: no such file or folder; check the path, or give a hub dataset as owner/name."
        )
    if source.suffix.lower() not in SUFFIXES:
        found = f"the extension {printable(source.suffix)}" if source.suffix else "no file extension"
        raise UserError(f"{path_name(source.name)}: has {found}; expected {EXTENSIONS}.")
    return Files([(source, path_name(source.name))], [])


def path_name(path: str | Path) -> str:
    """Return the path for a message; bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def train_split(splits: Mapping[str, Any], place: str) -> str:
    """Return the split to train on: `train`, the only one whose name begins so, or the only one if not for testing.

    splits: the names, each with its files.
    """
    names = sorted(splits)
    begun = [name for name in names if name.lower().startswith(TRAIN)]
    for choice in ([name for name in names if name.lower() == TRAIN], begun, names):
        if len(choice) == 1 and _split_word(choice[0]) in ("", TRAIN):
            return choice[0]
    if len(names) == 1:
        raise UserError(
            f"{place}: has only test rows ({_listed(splits[names[0]])}), but only the training split of a folder is "
            "read; to read these, give the file (or the folder of the split) itself."
        )
    raise UserError(
        f"{place}: has the splits {', '.join(printable(name) for name in names)}, but no single `train` split; "
        "give the files of the split to train on."
    )


def _folder(source: Path) -> Files:
    if (source / "dataset_dict.json").is_file():
        return _saved_splits(source)
    if (source / "state.json").is_file() and any(source.glob("*.arrow")):
        return _named(source, _saved_files(source), [])
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    usable = [
        file
        for file in files
        if file.suffix.lower() in SUFFIXES
        and not _NOT_ROWS.fullmatch(file.name)
        and not any(part.startswith(".") for part in file.parts)
    ]
    if not usable:
        raise UserError(f"{path_name(source)}: the folder has no data files; expected {EXTENSIONS}.")
    by_card = _card_splits(source, usable)
    splits = by_card or _splits_by_name(usable)
    if not splits:
        return _named(source, usable, [])
    name = train_split(splits, path_name(source))
    taken = splits[name]
    return _named(source, taken, _notes(name, taken, [file for file in usable if file not in taken]))


def _named(source: Path, files: Sequence[Path], notes: list[str]) -> Files:
    return Files([(source / file, path_name(file)) for file in files], notes)


def _notes(split: str, taken: Sequence[Path], left_out: Sequence[Path]) -> list[str]:
    notes = [f"read the split {printable(split)}: {_listed(taken)}"]
    return notes + ([f"left out: {_listed(left_out)}"] if left_out else [])


def _listed(files: Sequence[Path]) -> str:
    shown = ", ".join(path_name(file) for file in files[:5])
    return shown + (f" and {len(files) - 5} more files" if len(files) > 5 else "")


def _splits_by_name(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files by split; {} if none of them is for testing, so that all are training data.

    Files that name no split are for training, unless other files are named as the train split.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    if splits.keys() <= {"", TRAIN}:
        return {}
    unnamed = splits.pop("", [])
    if unnamed and not any(split.lower().startswith(TRAIN) for split in splits):
        splits[TRAIN] = unnamed
    return splits


def _split_of(file: Path) -> str:
    """Return the split named by the file or else by one of its folders, "" if none is."""
    if part := _PART.match(file.stem):
        return _SPLIT_WORDS.get(part[1].lower(), part[1])
    return next(filter(None, map(_split_word, (file.stem, *reversed(file.parent.parts)))), "")


def _split_word(name: str) -> str:
    """Return the split that a word of the name means, "" if none does."""
    words = re.split(r"[\W_\d]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")


def _card_splits(source: Path, usable: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files by split as listed in the dataset card (README.md), {} if it lists none."""
    try:
        head = _CARD_HEAD.match((source / "README.md").read_text("utf-8"))
        card = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # a README may contain anything
        return {}
    configs = card.get("configs") if isinstance(card, Mapping) else None
    configs = [each for each in configs if isinstance(each, Mapping)] if isinstance(configs, list) else []
    configs = [each for each in configs if each.get("data_files")]
    if not configs:
        return {}
    default = [
        each for each in configs if each.get("default") is True or each.get("config_name") == "default"
    ]
    if len(configs) > 1 and len(default) != 1:
        names = ", ".join(printable(str(each.get("config_name"))) for each in configs)
        raise UserError(
            f"{path_name(source)}: its README.md lists several datasets ({names}) and no default; give the files "
            "of one of them."
        )
    chosen = (default or configs)[0]
    folder = str(chosen.get("data_dir") or "")
    splits: dict[str, list[Path]] = {}
    for split, patterns in _patterns(chosen["data_files"]):
        matching = [re.compile(_as_regex(f"{folder}/{each}".lstrip("/"))) for each in patterns]
        files = [file for file in usable if any(each.fullmatch(file.as_posix()) for each in matching)]
        if files:
            splits.setdefault(split, []).extend(files)
    return splits


def _patterns(value: Any) -> Iterable[tuple[str, list[str]]]:
    """Yield a card's `data_files` as (split, patterns): a string, a list of strings or {split, path}, or a mapping."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        items = [(each.get("split", TRAIN), each.get("path")) for each in value]
    else:
        items = [(TRAIN, value)]
    for split, paths in items:
        yield str(split), [str(path) for path in (paths if isinstance(paths, list) else [paths]) if path]


def _as_regex(pattern: str) -> str:
    """Convert a file pattern to a regular expression: `**` for any folders, `*` and `?` within a name."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return "".join(parts.get(piece, re.escape(piece)) for piece in pieces)


def _saved_splits(source: Path) -> Files:
    """Return the train split of a `DatasetDict`, which has one folder per split."""
    names = _json(source / "dataset_dict.json").get("splits")
    splits = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    found = [name for name in splits if Path(name).name == name and (source / name / "state.json").is_file()]
    if not found:
        raise UserError(
            f"{path_name(source)}: dataset_dict.json lists no split that exists; save the dataset again."
        )
    split = train_split({name: [Path(name)] for name in found}, path_name(source))
    files = [Path(split) / file for file in _saved_files(source / split)]
    return _named(source, files, _notes(split, files, [Path(name) for name in found if name != split]))


def _saved_files(folder: Path) -> list[Path]:
    """Return the arrow files of a saved dataset, in the order of its rows."""
    entries = _json(folder / "state.json").get("_data_files")
    names = (
        [each.get("filename") for each in entries if isinstance(each, Mapping)]
        if isinstance(entries, list)
        else []
    )
    files = [Path(name) for name in names if isinstance(name, str) and Path(name).name == name]
    missing = [file.name for file in files if not (folder / file).is_file()]
    if missing or not files:
        reason = f"{printable(missing[0])} is missing" if missing else "its state.json lists no files"
        raise UserError(
            f"{path_name(folder)}: is an incomplete saved dataset: {reason}; copy or save it again."
        )
    return files


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = load_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path_name(path)}: is not readable JSON ({error}); save the dataset again."
        ) from None
    return content if isinstance(content, Mapping) else {}
