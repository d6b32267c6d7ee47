"""Verify a GGUF file: llama.cpp opens it, tokenizes as the tokenizer does, and gives the source model's output."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.data import generation_prompt
from fettle.engine.llama_cpp.gguf_file import GGUFFile, common_length
from fettle.engine.llama_cpp.tokenizer import LlamaCppTokenizer
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
    inputs = [tokenizer(text)["input_ids"] for text in PROBES]
    divergences, agreements = zip(*(_compare(model, file, ids) for ids in inputs), strict=True)
    expected = _greedy(model, inputs[0])
    return Verification(
        texts=len(texts),
        texts_equal=len(texts) - len(unequal),
        unequal=tuple(unequal[:5]),
        kl=float(torch.cat(divergences).mean()),
        top_agreement=float(torch.cat(agreements).float().mean()),
        continuation_tokens=len(expected),
        continuation_equal=common_length(expected, _greedy_in_file(file, inputs[0])),
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


def file_logits(file: GGUFFile, ids: list[int]) -> torch.Tensor:
    """Return the logits at every position, fp32 (tokens, vocabulary)."""
    return torch.cat([chunk.clone() for chunk in file.logits(ids, range(len(ids)))])


@torch.inference_mode()
def _compare(model: PreTrainedModel, file: GGUFFile, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(source || file) in nats and whether the most likely token is the same, both (tokens,)."""
    output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    source = output.logits[0].double().cpu().log_softmax(-1)
    found = file_logits(file, ids).double().log_softmax(-1)
    return kl_divergence(source, found), source.argmax(-1) == found.argmax(-1)


@torch.inference_mode()
def _greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        ids.append(int(output.logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _greedy_in_file(file: GGUFFile, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(file.next_logits(ids).argmax()))
    return ids[len(prompt) :]
