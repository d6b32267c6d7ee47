"""A conversation in the terminal: each turn is rendered with the model's own template, answers stream."""

import sys

from transformers import PreTrainedTokenizerBase

from fettle import terminal
from fettle.data import generation_prompt
from fettle.engine.decode import LONGEST_COMPLETION, Model, Sampling, stream
from fettle.errors import ModelFault, UserError

HELP = "Type a message; /new starts over, /exit or Ctrl-D leaves."


def chat(
    model: Model, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, system: str | None = None
) -> None:
    """Read turns from standard input and answer them on standard output until the user leaves.

    The earliest exchanges are forgotten where the conversation outgrows the model's context. A message that
    alone is too long for it is refused on standard error, and the conversation goes on without it. Raises ModelFault
    if the model has no answer to any message.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{model.name_or_path} has no chat template, so it cannot chat; use `fettle generate` to have a text "
            "continued, or train it on chats first."
        )
    first = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    terminal.say(HELP)
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
                terminal.say(str(error))


def _exchange(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    first: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> list[dict[str, str]]:
    """Answer the last turn on standard output; return the turns remembered, the answer among them."""
    text, turns = _fitting(model, tokenizer, sampling, first, turns)
    answer = ""
    for piece in stream(model, tokenizer, text, sampling, is_rendered=True):
        terminal.give(piece, end="")
        answer += piece
    terminal.give("")
    return [*turns, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    """One line from the user; None at the end."""
    try:
        words = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text.") from error
    return None if words in ("/exit", "/quit") else words


def _fitting(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    first: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> tuple[str, list[dict[str, str]]]:
    """The rendered conversation and its turns, without the oldest exchanges if they do not fit."""
    context: int = model.config.max_position_embeddings
    room = context - (sampling.max_new_tokens or min(LONGEST_COMPLETION, context // 2))
    while True:
        text = generation_prompt(tokenizer, [*first, *turns])
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens <= room or len(turns) == 1:
            return text, turns
        turns = turns[2:]
