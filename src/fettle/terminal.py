"""What fettle prints: text from outside cannot control the terminal.

Rows, model answers, names of files and error messages may contain escape codes: a terminal that receives them changes
its title, clears the screen or fills the clipboard. Everything that fettle prints goes through this module, which shows
control characters as visible symbols (␛ for an escape). What is data for another program (an answer, a path) is written
unchanged, unless standard output is a terminal.
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
# They reorder the text around them, so that what is shown is not what is there.
_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))

_VISIBLE = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
    | {_DELETE: "\u2421"}
    | dict.fromkeys((*_C1, *_BIDIRECTIONAL), _REPLACEMENT)
)


def visible(text: str) -> str:
    """Return `text` with control characters, line breaks and tabs aside, as symbols of the same width."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def say(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a message for a person, on standard error by default."""
    print(visible(text), end=end, file=file or sys.stderr, flush=True)


def give(text: str, *, end: str = "\n") -> None:
    """Print a result on standard output: unchanged into a file or pipe, as `visible` on a terminal."""
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def console(*, stderr: bool = False) -> "Console":
    """Return a console for messages, tables and progress bars, on which no text is read as markup."""
    return _clean_console()(stderr=stderr, markup=False, emoji=False, highlight=False)


@functools.cache
def _clean_console() -> type["Console"]:
    """The class of a console on which only its own styles send control codes. rich is imported when it is needed."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return CleanConsole
