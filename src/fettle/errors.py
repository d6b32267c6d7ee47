"""The one error a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence or two: the file, row or option; what was found; what was expected;
    the nearest thing that works. The command line prints it without a traceback and exits with code 2.
    """
