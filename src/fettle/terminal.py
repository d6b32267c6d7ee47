"""Printing to the terminal, safe against control codes in untrusted text.

Rows, model answers, file names and error messages may contain escape codes, which can change a terminal's title,
clear its screen or write to the clipboard. Everything fettle prints goes through this module, which replaces control
characters with visible symbols (␛ for escape). Results meant for other programs (an answer, a path) are written
unchanged unless standard output is a terminal.
"""

import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = "\n\t"
_DELETE, _REPLACEMENT = 0x7F, "\ufffd"
_C1 = range(0x80, 0xA0)
# These reorder the text around them, so the displayed text can differ from the actual text.
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))

_VISIBLE = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
    | {_DELETE: "\u2421"}
    | dict.fromkeys((*_C1, *_BIDIRECTIONAL), _REPLACEMENT)
)


def visible(text: str) -> str:
    """Return `text` with control characters, except line breaks and tabs, replaced by visible symbols."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def print_message(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a message for the user, by default on standard error."""
    print(visible(text), end=end, file=file or sys.stderr, flush=True)


def print_result(text: str, *, end: str = "\n") -> None:
    """Print a result on standard output: unchanged to a file or pipe, through `visible` to a terminal."""
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def console(*, stderr: bool = False) -> "Console":
    """Return a rich console for messages, tables and progress bars that does not interpret text as markup.

    In a notebook it writes plain lines, as into a pipe: rich would make each line an output of its own.
    """
    forced = False if type(sys.stdout).__module__.startswith("ipykernel.") else None  # None: rich finds out
    return _clean_console()(
        stderr=stderr, markup=False, emoji=False, highlight=False, force_terminal=forced, force_jupyter=forced
    )


@functools.cache
def _clean_console() -> type["Console"]:
    """A rich console whose text passes through `visible`. A function, so that rich is imported only if needed."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return CleanConsole
