"""Errors with messages for the user, and the exception for an interrupted run."""

import errno
import os
import re
from collections.abc import Callable

REMEDIES = {
    errno.ENOSPC: "free some space there, or choose a location on another disk",
    errno.EDQUOT: "free some of your quota there, or choose a location on another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f), or choose a disk that allows larger files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "close other programs, or use a smaller model",
}
"""What the user can do when the system runs out of a resource, by errno."""

_OPTION = re.compile("\x0e([a-z_]+)\x0f")  # shift out, shift in


def option(name: str) -> str:
    """Return an option's name for the message of a UserError, marked so that each face can word it."""
    return f"\x0e{name}\x0f"


class UserError(Exception):
    """An error the user can fix.

    The message is one or two sentences: which file, row or option; what was found; what was expected; how to fix it.
    An option in it is marked by `option`: `str(error)` names it as Python does (max_length). The command line writes
    --max-length, prints the message without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return self.worded(str)

    def worded(self, word: Callable[[str], str]) -> str:
        """Return the message with `word(name)` for each option."""
        return _OPTION.sub(lambda found: word(found[1]), super().__str__())


class ModelFault(UserError):
    """The model's own files are broken, whatever the input: NaN logits, a chat template that does not terminate.

    Code that skips rows or messages that the model cannot process must let this error through.
    """


class ProofError(Exception):
    """The output was written but failed verification. The message is one sentence, like a UserError's; exit code 1."""


class Interrupted(Exception):
    """Ctrl-C stopped a run that can be resumed; the message is the command that resumes it."""


def shortage(error: Exception) -> str | None:
    """Return a message if `error` says that the system is out of a resource (disk, memory, name length), else None.

    C++ and Rust libraries report the errno, or the lack of memory, only in the text of their errors.
    """
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    elif isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        number = errno.ENOMEM
    if number not in REMEDIES:
        return None
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"{place}{os.strerror(number)}: {REMEDIES[number]}."


def reason_of(error: BaseException) -> str:
    """Return a library's error as one line for a UserError: its first line, or two if the first ends with a colon.

    The type is included for errors such as KeyError, whose text alone says little. Options stay marked.
    """
    if isinstance(error, UserError):
        return error.worded(option)
    lines = [line.strip() for line in str(error).strip().splitlines()] or ["no reason given"]
    reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
    return (
        reason
        if isinstance(error, ValueError | RuntimeError | OSError)
        else f"{type(error).__name__}: {reason}"
    )
