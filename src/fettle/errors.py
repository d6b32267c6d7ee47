"""The errors a user is meant to read, and the one interruption."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence or two: the file, row or option; what was found; what was expected;
    the nearest thing that works. The command line prints it without a traceback and exits with code 2.
    """


class ProofError(Exception):
    """What was made is there, and does not say what it should: one sentence like a UserError's, exit code 1."""


class Interrupted(Exception):
    """Ctrl-C ended a run that can go on; the message is the command to type."""


def reason_of(error: Exception) -> str:
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
