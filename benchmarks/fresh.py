"""Run a script of this folder in a fresh process, so that no run sees another's memory, and take its result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = "RESULT "


class Failed(Exception):
    """A run that ended without a result; the message is the end of what it printed."""


def run(script: str, *words: str) -> dict[str, Any]:
    """What the script printed as one line of JSON after "RESULT". Raises Failed where there is none."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words], capture_output=True, text=True, check=False
    )
    return result_in(done.stdout, done.stderr)


def result_in(output: str, errors: str = "") -> dict[str, Any]:
    """The last result among a process's lines."""
    for line in reversed(output.splitlines()):
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    lines = (errors.strip() or output.strip() or "no output").splitlines()
    raise Failed(" / ".join(lines[-2:])[-500:])


def write(file: Path, content: dict[str, Any]) -> None:
    """Write a result for people and programs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
