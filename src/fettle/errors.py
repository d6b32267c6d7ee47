"""The errors a user is meant to read, and the one interruption."""

import errno
import os
import re

WAYS_OUT = {
    errno.ENOSPC: "free some space there, or name a place on another disk",
    errno.EDQUOT: "free some of your quota there, or name a place on another disk",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or name a place on a disk that takes larger files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "close other programs, or take a smaller model",
}
"""What a user can do where the system has no more of something."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence or two: the file, row or option; what was found; what was expected;
    the nearest thing that works. The command line prints it without a traceback and exits with code 2.
    """


class ModelFault(UserError):
    """The model's files are at fault, whatever it is given: logits of NaN, a chat template without end.

    Where a row or a message that the model refuses is left out, this still ends the job.
    """


class ProofError(Exception):
    """What was made is there, and does not say what it should: one sentence like a UserError's, exit code 1."""


class Interrupted(Exception):
    """Ctrl-C ended a run that can go on; the message is the command to type."""


def shortage(error: Exception) -> str | None:
    """Return the sentence for what the system has no more of: disk, memory, a name's length; None for other errors.

    Libraries in C++ and Rust pass its number, or its lack of memory, on as text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    elif isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
        number = errno.ENOMEM
    if number not in WAYS_OUT:
        return None
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"{place}{os.strerror(number)}: {WAYS_OUT[number]}."


def reason_of(error: BaseException) -> str:
    """Return a library's error as one line for a UserError: its first line, or two where that only announces.

    KeyError and the like, whose text alone says nothing, are named.
    """
    if isinstance(error, UserError):
        return str(error)
    lines = [line.strip() for line in str(error).strip().splitlines()] or ["no reason given"]
    reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
    return (
        reason
        if isinstance(error, ValueError | RuntimeError | OSError)
        else f"{type(error).__name__}: {reason}"
    )
