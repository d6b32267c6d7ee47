"""An interactive chat in the terminal, with the model's chat template and streamed answers."""

import json
import sys
from pathlib import Path

from fettle import terminal
from fettle.data import Message
from fettle.engine.request import LONGEST_COMPLETION, Sampling
from fettle.engine.text import Engine
from fettle.errors import ModelFault, UserError
from fettle.files import require_new_file, write_aside
from fettle.options import flag

HELP = (
    "Type a message; end a line with \\ to continue it on the next. Ctrl-C stops an answer. /reset starts a new "
    "conversation, /system TEXT one with that system message, /save FILE keeps it, /exit or Ctrl-D quits."
)


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
    talk = _Conversation(engine, sampling, system)
    terminal.print_message(HELP)
    while (words := _read()) is not None:
        if not words:
            continue
        try:
            if not talk.obey(words):
                talk.say(words)
        except ModelFault:
            raise
        except UserError as error:
            terminal.print_message(error.worded(flag))


class _Conversation:
    def __init__(self, engine: Engine, sampling: Sampling, system: str | None) -> None:
        self.engine, self.sampling, self.system = engine, sampling, system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The system message, if any, and the turns."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def obey(self, words: str) -> bool:
        """Do what a command says; False if the words are a message."""
        command, _, argument = words.partition(" ")
        if command in ("/reset", "/new"):
            self.turns = []
            terminal.print_message("new conversation")
        elif command == "/system":
            self.system, self.turns = argument.strip() or None, []
            terminal.print_message("new conversation" + (" with this system message" if self.system else ""))
        elif command == "/save":
            self._save(argument.strip())
        elif command == "/help":
            terminal.print_message(HELP)
        else:
            return False
        return True

    def say(self, words: str) -> None:
        """Answer a message on standard output. Ctrl-C ends the answer, of which what is there is kept."""
        before = self.turns
        self.turns = [*before, {"role": "user", "content": words}]
        answer = ""
        try:
            self._trim_to_context()
            for piece in self.engine.stream(self.messages, self.sampling):
                terminal.print_result(piece, end="")
                answer += piece
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            terminal.print_message(" (stopped)", end="")
        except UserError:
            self.turns = before
            raise
        terminal.print_result("")
        self.turns = [*self.turns, {"role": "assistant", "content": answer}]

    def _save(self, name: str) -> None:
        """Write the conversation as a row of training data."""
        if not name:
            raise UserError("/save needs a file name, such as /save talk.jsonl.")
        if not self.turns:
            raise UserError("there is nothing to save yet.")
        path = Path(name).expanduser()
        if path.exists():
            raise UserError(f"{path} already exists; choose another name.")
        require_new_file(path)
        with write_aside(path) as aside:
            row = json.dumps({"messages": self.messages}, ensure_ascii=False)
            aside.write_text(row + "\n", encoding="utf-8")
        terminal.print_message(f"saved {path}")

    def _trim_to_context(self) -> None:
        """Drop the oldest exchanges that do not fit into the context with an answer."""
        context = self.engine.context_tokens
        room = context - (self.sampling.max_new_tokens or min(LONGEST_COMPLETION, context // 2))
        while len(self.turns) > 1:
            text = self.engine.text_of(self.messages)
            if len(self.engine.encode(text, is_rendered=True)) <= room:
                break
            self.turns = self.turns[2:]
            terminal.print_message("the oldest exchange no longer fits into the context and is left out")


def _read() -> str | None:
    """One message from the user, of several lines if each but the last ends with a backslash; None at the end."""
    lines: list[str] = []
    while True:
        try:
            line = input(("... " if lines else "> ") if sys.stdin.isatty() else "")
        except EOFError:
            return "\n".join(lines).strip() if lines else None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            terminal.print_message("\n/exit or Ctrl-D quits")
            lines = []
            continue
        except UnicodeDecodeError as error:
            raise UserError("standard input is not UTF-8 text.") from error
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        words = "\n".join([*lines, line]).strip()
        return None if words in ("/exit", "/quit") else words
