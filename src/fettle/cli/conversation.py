"""An interactive chat in the terminal, with the model's chat template and streamed answers."""

import sys

from transformers import PreTrainedTokenizerBase

from fettle import terminal
from fettle.data import generation_prompt
from fettle.engine.decode import LONGEST_COMPLETION, Model, Sampling, stream
from fettle.errors import ModelFault, UserError
from fettle.options import flag

HELP = "Type a message; /new starts a new conversation, /exit or Ctrl-D quits."


def chat(
    model: Model, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, system: str | None = None
) -> None:
    """Read turns from standard input and answer them on standard output until the user leaves.

    If the conversation outgrows the model's context, the oldest exchanges are dropped. A message that is too long by
    itself is rejected on standard error and the conversation continues without it. Raises ModelFault if the model
    cannot answer any message.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{model.name_or_path} has no chat template, so it cannot chat; use `fettle generate` to complete a "
            "text, or fine-tune it on chats first."
        )
    first = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    terminal.print_message(HELP)
    while (words := _read()) is not None:
        if words == "/new":
            turns = []
        elif words:
            try:
                turns = _exchange(
                    model, tokenizer, sampling, first, [*turns, {"role": "user", "content": words}]
                )
            except ModelFault:
                raise
            except UserError as error:
                terminal.print_message(error.worded(flag))


def _exchange(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    first: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> list[dict[str, str]]:
    """Answer the last turn on standard output; return the turns kept, including the answer."""
    text, turns = _trim_to_context(model, tokenizer, sampling, first, turns)
    answer = ""
    for piece in stream(model, tokenizer, text, sampling, is_rendered=True):
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
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    first: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> tuple[str, list[dict[str, str]]]:
    """Render the conversation, without the oldest exchanges if they do not fit; return the text and the turns kept."""
    context: int = model.config.max_position_embeddings
    room = context - (sampling.max_new_tokens or min(LONGEST_COMPLETION, context // 2))
    while True:
        text = generation_prompt(tokenizer, [*first, *turns])
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens <= room or len(turns) == 1:
            return text, turns
        turns = turns[2:]
