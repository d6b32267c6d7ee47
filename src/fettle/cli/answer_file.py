"""Answer every prompt of a file into another file; what has been answered survives an interruption.

Answers are appended to OUTPUT.unfinished as they are completed. When all are there, OUTPUT is written in the order of
the prompts and the other file removed. The same command continues where an earlier one stopped.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fettle import terminal
from fettle.data import PromptRow, read_prompts
from fettle.data.rows import BadRows
from fettle.engine.request import Sampling
from fettle.engine.text import Engine
from fettle.errors import Interrupted, UserError, option
from fettle.events import Report, progress
from fettle.files import require_new_file, sibling, write_aside


class AnswerFile:
    """The prompts, and the answers that an earlier run has left."""

    def __init__(self, prompts: Path, output: Path, *, overwrite: bool, settings: dict[str, Any]) -> None:
        """settings: what the answers depend on besides the prompts. Raises UserError for a file that cannot be used."""
        require_new_file(output, replace=overwrite)
        self.output, self.overwrite = output, overwrite
        self.unfinished = sibling(output, ".unfinished")
        self.rows: list[PromptRow] = read_prompts(prompts)
        if not self.rows:
            raise UserError(f"{prompts}: has no rows; expected at least one.")
        facts = json.dumps([[row.row for row in self.rows], settings], sort_keys=True, default=str)
        self._header = {"answers to": hashlib.sha256(facts.encode()).hexdigest()}
        self.answers = self._kept()

    def answer(
        self, engine: Engine, sampling: Sampling, *, raw: bool, system: str | None, report: Report
    ) -> None:
        """Answer what is left and write the output."""
        texts = [engine.text_of(row.prompt, raw=raw, system=system) for row in self.rows]
        self._require_room(engine, texts, sampling, engine.is_chat(raw))
        left = [n for n in range(len(texts)) if n not in self.answers]
        if self.answers:
            terminal.print_message(f"{len(self.answers):,} of {len(texts):,} answers are kept from before")
        with self._log() as log, progress(f"answering {len(texts):,} prompts", report) as advance:

            def keep(place: int, answer: str) -> None:
                number = left[place]
                self.answers[number] = answer
                _write_line(log, {"row": number, "answer": answer})
                advance(len(self.answers) / len(texts), f"{len(self.answers):,}/{len(texts):,}")

            engine.complete(
                [texts[number] for number in left],
                sampling,
                is_rendered=engine.is_chat(raw),
                on_answer=keep,
                numbers=left,
            )
        with (
            write_aside(self.output, replace=self.overwrite) as aside,
            open_text(aside) as file,
        ):
            for number, row in enumerate(self.rows):
                _write_line(file, {**row.row, "answer": self.answers[number]})
        self.unfinished.unlink(missing_ok=True)

    def _require_room(self, engine: Engine, texts: list[str], sampling: Sampling, is_rendered: bool) -> None:
        """Raise BadRows with all prompts that leave no room for an answer in the model's context."""
        problems = []
        for number, text in enumerate(texts, start=1):
            try:
                engine.tokens.new_tokens(len(engine.encode(text, is_rendered=is_rendered)), sampling)
            except UserError as error:
                problems.append(f"row {number}: {error}")
        if problems:
            raise BadRows(problems, len(texts))

    def _kept(self) -> dict[int, str]:
        """Return the answers of an earlier run. Raises UserError if they are to other prompts or settings."""
        if not self.unfinished.exists():
            return {}
        if not self.unfinished.is_file():
            raise UserError(
                f"{self.unfinished} is not a file: remove it, or choose another {option('output')}."
            )
        lines = self.unfinished.read_bytes().splitlines(keepends=True)
        # a killed process may leave part of the last one
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            header, *found = (json.loads(line) for line in whole)
            answers = {int(each["row"]): str(each["answer"]) for each in found}
        except (ValueError, KeyError, TypeError):
            header, answers = None, {}
        if not answers and isinstance(header, dict) and header.keys() == self._header.keys():
            return {}  # stopped before the first answer
        if header != self._header or not all(0 <= number < len(self.rows) for number in answers):
            raise UserError(
                f"{self.unfinished} has answers to other prompts or with other options: repeat that command to finish "
                f"them, remove the file, or choose another {option('output')}."
            )
        return answers

    @contextmanager
    def _log(self) -> Iterator[IO[str]]:
        """Open the file of finished answers; a shortage or Ctrl-C leaves it, complete to the last answer."""
        aside = sibling(self.unfinished, ".new")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            opened = open_text(aside)
        except OSError as error:
            raise UserError(
                f"{aside} cannot be written ({error.strerror}); choose another {option('output')}."
            ) from None
        with opened as file:
            _write_line(file, self._header)
            for number, answer in self.answers.items():
                _write_line(file, {"row": number, "answer": answer})
            os.replace(aside, self.unfinished)
            try:
                yield file
            except KeyboardInterrupt:
                raise Interrupted(shlex.join(["fettle", *sys.argv[1:]])) from None


def settings_of(model: str, sampling: Sampling, **options: Any) -> dict[str, Any]:
    """Return what the answers of a command depend on; of a local model also the sizes and times of its files."""
    path = Path(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return {"model": model, "files": stamps, "sampling": asdict(sampling), **options}


def open_text(path: Path) -> IO[str]:
    """Open a file for JSON lines; half of a surrogate pair, which UTF-8 has no bytes for, is written as its escape."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace")


def _write_line(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    file.flush()
