"""Proof of a GGUF file: llama.cpp opens it, cuts text as the tokenizer does, and says what the source model says."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.errors import UserError
from fettle.export.gguf.battery import battery
from fettle.export.gguf.ggml import library

PROBES = (
    "The quick brown fox jumps over the lazy dog. 0123456789",
    'def add(a, b):\n    return a + b\n\n{"name": "Ana", "count": 3}',
    "Water boils at 100 degrees. Why? Because its vapour pressure then equals the air's.",
)
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What llama.cpp made of a file, beside the model it came from."""

    texts: int
    texts_equal: int
    """Of `texts`, those cut into the tokenizer's own ids."""
    unequal: tuple[str, ...]
    """The first few others."""
    kl: float
    """Mean over positions of KL(source || file), in nats."""
    top_agreement: float
    """Share of positions whose likeliest token is the same."""
    continuation_tokens: int
    continuation_equal: int
    """Tokens of the greedy continuation before the first that differs."""


def verify(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Sequence[str] | None = None,
) -> Verification:
    """Run the file in llama.cpp, in a process of its own, and compare it with `model`.

    texts: to be cut into ids (default: `battery`, with the tokenizer's special tokens).
    Raises UserError where llama.cpp is not installed, or does not open or run the file.
    """
    library()
    if texts is None:
        texts = battery(tokenizer.all_special_tokens)
    inputs = [tokenizer(text)["input_ids"] for text in PROBES]
    prompt = inputs[0]
    request = {
        "model": str(Path(path).absolute()),
        "texts": list(texts),
        "inputs": inputs,
        "prompt": prompt,
        "new_tokens": NEW_TOKENS,
    }
    arrays = ask(request)
    unequal = [
        text for n, text in enumerate(texts) if arrays[f"ids_{n}"].tolist() != tokenizer(text)["input_ids"]
    ]
    divergences, agreements = zip(
        *(_compare(model, ids, arrays[f"logits_{n}"]) for n, ids in enumerate(inputs)), strict=True
    )
    expected = _greedy(model, prompt)
    return Verification(
        texts=len(texts),
        texts_equal=len(texts) - len(unequal),
        unequal=tuple(unequal[:5]),
        kl=float(torch.cat(divergences).mean()),
        top_agreement=float(torch.cat(agreements).float().mean()),
        continuation_tokens=len(expected),
        continuation_equal=_common(expected, arrays["continuation"].tolist()),
    )


def ask(request: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return llama.cpp's answer to `request` (see `fettle.export.gguf.llama_cpp.answer`) from a child process."""
    with tempfile.TemporaryDirectory() as folder:
        question, reply = Path(folder, "request.json"), Path(folder, "answer.npz")
        question.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "fettle.export.gguf.llama_cpp", str(question), str(reply)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            lines = ended.stderr.strip().splitlines() or ["no reason given"]
            raise UserError(f"llama.cpp failed on {request['model']} (exit {ended.returncode}): {lines[-1]}")
        with np.load(reply) as arrays:
            return dict(arrays)


@torch.inference_mode()
def _compare(model: PreTrainedModel, ids: list[int], logits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(source || file) in nats and whether the likeliest token is the same, both (tokens,)."""
    output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    source = output.logits[0].double().cpu().log_softmax(-1)
    found = torch.from_numpy(logits).double().log_softmax(-1)
    return (source.exp() * (source - found)).sum(-1), source.argmax(-1) == found.argmax(-1)


@torch.inference_mode()
def _greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        ids.append(int(output.logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _common(expected: list[int], found: list[int]) -> int:
    """Return how many tokens from the start are the same."""
    same = 0
    for left, right in zip(expected, found, strict=False):
        if left != right:
            break
        same += 1
    return same
