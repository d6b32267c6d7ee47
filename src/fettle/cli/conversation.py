"""An interactive chat in the terminal, with the model's chat template and streamed answers."""

import sys

from fettle import terminal
from fettle.data import Message
from fettle.engine.request import LONGEST_COMPLETION, Sampling
from fettle.engine.text import Engine
from fettle.errors import ModelFault, UserError
from fettle.options import flag

HELP = "Type a message; /new starts a new conversation, /exit or Ctrl-D quits."


def chat(engine: Engine, sampling: Sampling, *, system: str | None = None) -> None:
    """Read turns from standard input and answer them on standard output until the user leaves.

    If the conversation outgrows the model's context, the oldest exchanges are dropped. A message that is too long by
    itself is rejected on standard error and the conversation continues without it. Raises ModelFault if the model
    cannot answer any message.
    """
    if not engine.is_chat():
        raise UserError(
            f"{engine.tokens.name} has no chat template, so it cannot chat; use `fettle generate` to complete a "
            "text, or fine-tune it on chats first."
        )
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    turns: list[Message] = []
    terminal.print_message(HELP)
    while (words := _read()) is not None:
        if words == "/new":
            turns = []
        elif words:
            try:
                turns = _exchange(engine, sampling, first, [*turns, {"role": "user", "content": words}])
            except ModelFault:
                raise
            except UserError as error:
                terminal.print_message(error.worded(flag))


def _exchange(
    engine: Engine, sampling: Sampling, first: list[Message], turns: list[Message]
) -> list[Message]:
    """Answer the last turn on standard output; return the turns kept, including the answer."""
    turns = _trim_to_context(engine, sampling, first, turns)
    answer = ""
    for piece in engine.stream([*first, *turns], sampling):
        terminal.print_result(piece, end="")
        answer += piece
    terminal.print_result("")
    return [*turns, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    """One line from the user; None at the end of the conversation."""
    try:
        words = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text.") from error
    return None if words in ("/exit", "/quit") else words


def _trim_to_context(
    engine: Engine, sampling: Sampling, first: list[Message], turns: list[Message]
) -> list[Message]:
    """Return the turns without the oldest exchanges that do not fit."""
    context = engine.context_tokens
    room = context - (sampling.max_new_tokens or min(LONGEST_COMPLETION, context // 2))
    while len(turns) > 1:
        text = engine.text_of([*first, *turns])
        if len(engine.encode(text, is_rendered=True)) <= room:
            break
        turns = turns[2:]
    return turns
