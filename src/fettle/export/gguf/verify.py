"""Verify a GGUF file: llama.cpp opens it, tokenizes as the tokenizer does, and gives the source model's output."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.data import generation_prompt
from fettle.engine.base import TokenEngine
from fettle.engine.llama_cpp.context import common_length
from fettle.engine.llama_cpp.engine import LlamaCppEngine
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.llama_cpp.tokenizer import LlamaCppTokenizer
from fettle.engine.request import Request, Sampling, ScoreRequest
from fettle.engine.text import token_engine
from fettle.errors import UserError
from fettle.export.gguf.battery import battery
from fettle.export.gguf.tokenizer import template_begins
from fettle.export.merge import PROBES
from fettle.ops.kl_divergence import kl_divergence

NEW_TOKENS = 16

CHAT = (
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one?"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The results of llama.cpp with a file, compared with the model that it was made from."""

    texts: int
    texts_equal: int
    """How many of `texts` get the same ids from llama.cpp and the tokenizer."""
    unequal: tuple[str, ...]
    """The first few of the others."""
    kl: float
    """Mean over positions of KL(source || file), in nats."""
    top_agreement: float
    """Share of positions with the same most likely token."""
    continuation_tokens: int
    continuation_equal: int
    """Tokens of the greedy continuation before the first that differs."""
    has_template: bool
    """The file has a chat template, or the model has none either."""
    chat_equal: bool
    """A chat rendered in the file's template and tokenized by llama.cpp gets the same ids."""


def verify(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
) -> Verification:
    """Run the file in llama.cpp and compare it with `model`.

    texts: to tokenize (default: `battery`, with the tokenizer's special tokens).
    Raises UserError if llama.cpp is not installed, or does not open or run the file.
    """
    file = GGUFFile(Path(path))
    texts = battery(tokenizer.all_special_tokens) if texts is None else texts
    # a file whose template does not begin with the first token does not add it to other texts either
    adds = not tokenizer.chat_template or template_begins(tokenizer)
    expected_ids = {text: tokenizer(text, add_special_tokens=adds)["input_ids"] for text in texts}
    unequal = [text for text, ids in expected_ids.items() if file.tokenize(text, add_special=adds) != ids]
    probes = [tokenizer(text)["input_ids"] for text in PROBES]
    expected = _output(token_engine(model, running=1), probes)
    found = _output(LlamaCppEngine(file, running=1), probes)
    return Verification(
        texts=len(texts),
        texts_equal=len(texts) - len(unequal),
        unequal=tuple(unequal[:5]),
        kl=float(kl_divergence(expected.log_probs, found.log_probs).mean()),
        top_agreement=float((expected.log_probs.argmax(-1) == found.log_probs.argmax(-1)).double().mean()),
        continuation_tokens=len(expected.continuation),
        continuation_equal=common_length(expected.continuation, found.continuation),
        has_template=bool(file.chat_template) or not tokenizer.chat_template,
        chat_equal=_is_chat_equal(file, tokenizer),
    )


def _is_chat_equal(file: GGUFFile, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat gets equal ids; also true if there is no template, or if it refuses the chat."""
    if not tokenizer.chat_template or not file.chat_template:
        return True
    try:
        expected = tokenizer(generation_prompt(tokenizer, CHAT), add_special_tokens=False)["input_ids"]
        text = generation_prompt(LlamaCppTokenizer(file), CHAT)
    except UserError:
        return True
    if file.tokenize("x", add_special=True)[:1] == [file.special("bos")]:
        text = text.removeprefix(tokenizer.bos_token or "")  # as llama.cpp does, which adds it again
    return file.tokenize(text, add_special=True) == expected


@dataclass(slots=True)
class _Output:
    """What a model says to the probes: its log-probabilities, fp64 (tokens, vocabulary), and a greedy continuation."""

    log_probs: torch.Tensor
    continuation: list[int]


def _output(engine: TokenEngine, probes: Sequence[list[int]]) -> _Output:
    found: list[torch.Tensor] = []
    requests = [ScoreRequest(tokens=ids, positions=range(1, len(ids))) for ids in probes]
    engine.score(requests, lambda _, log_probs: found.append(log_probs.double()))
    request = Request(tokens=probes[0], sampling=Sampling(max_new_tokens=NEW_TOKENS))
    return _Output(torch.cat(found), engine.generate([request])[0].tokens)
