"""How probable a model finds rows, token by token, and how far a second model is from it.

Of the first model two things are kept for every trained token: the log-probability it gave to it, and the token it
found likeliest. Its whole distribution, which the KL divergence needs, is kept of at most KL_TOKENS tokens, spread
evenly, in a file: so only one model is in memory at a time, and a vocabulary of 256,000 takes at most 4.3 GB of disk.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fettle.data import Example
from fettle.data.tokenize import NOT_TRAINED
from fettle.engine.decode import not_finite
from fettle.files import require_free_space
from fettle.ops.kl_divergence import kl_divergence

OnExample: TypeAlias = Callable[[int, torch.Tensor], None]
"""Is given an example's number and log-probabilities at its trained tokens, fp32 (trained tokens, vocabulary)."""

KL_TOKENS = 4096
"""Distributions kept of the first model."""

CHUNK_TOKENS = 64
"""Distributions compared at once, in fp64."""


@dataclass(slots=True)
class Scores:
    """What one model made of its examples, in nats; `top` holds its likeliest tokens, (trained tokens,) a row each."""

    log_probs: list[torch.Tensor] = field(default_factory=list)
    top: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.log_probs)

    @property
    def loss(self) -> float:
        """Mean negative log-probability of a trained token, in nats."""
        return -math.fsum(float(row.double().sum()) for row in self.log_probs) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class Distributions:
    """Log-probabilities of the whole vocabulary at some of the first model's tokens, fp32, in a temporary file."""

    def __init__(self, examples: Sequence[Example], vocab_size: int) -> None:
        tokens = sum(example.trained_tokens for example in examples)
        stride = -(-tokens // KL_TOKENS)
        folder = Path(tempfile.gettempdir())
        self._at: list[
            tuple[list[int], int]
        ] = []  # per example: which of its trained tokens, and their first row
        rows = seen = 0
        for example in examples:
            kept = [n for n in range(example.trained_tokens) if (seen + n) % stride == 0]
            self._at.append((kept, rows))
            rows, seen = rows + len(kept), seen + example.trained_tokens
        require_free_space(folder, 4 * rows * vocab_size, "keeping the first model's probabilities")
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it lives as long as this object
        self._rows = np.memmap(self._file, dtype=np.float32, mode="w+", shape=(rows, vocab_size))
        self.vocab_size = vocab_size

    def keep(self, number: int, log_probs: torch.Tensor) -> None:
        """Keep those of example `number`; log_probs: (trained tokens, vocabulary)."""
        kept, first = self._at[number]
        self._rows[first : first + len(kept)] = log_probs[kept].numpy()

    def divergence(self, number: int, log_probs: torch.Tensor) -> torch.Tensor:
        """Return KL(first || second) in nats at the kept tokens of example `number`, fp64 (kept,)."""
        kept, first = self._at[number]
        found = []
        for start in range(0, len(kept), CHUNK_TOKENS):
            rows = kept[start : start + CHUNK_TOKENS]
            ours = torch.from_numpy(self._rows[first + start : first + start + len(rows)].copy())
            found.append(kl_divergence(ours, log_probs[rows]))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.double)


class Gap:
    """How far a second model is from the first, on the examples that both cut into the same ids, trained alike."""

    def __init__(
        self,
        first: tuple[Sequence[Example], Scores, Distributions],
        examples: Sequence[Example],
        vocab_size: int,
    ) -> None:
        firsts, self._scores, self._distributions = first
        numbers = {_key(example): number for number, example in enumerate(firsts)}
        self._twins = [numbers.get(_key(example)) for example in examples]
        self.unequal = self._twins.count(None)
        """Examples that the first model's tokenizer and template turn into other ids, or trains elsewhere."""
        self.has_equal_vocabulary = vocab_size == self._distributions.vocab_size
        self._divergences: list[torch.Tensor] = []
        self._agreements: list[torch.Tensor] = []

    def add(self, number: int, log_probs: torch.Tensor) -> None:
        """Compare the second model's example `number`; log_probs: (trained tokens, vocabulary)."""
        twin = self._twins[number]
        if twin is None:
            return
        self._agreements.append(self._scores.top[twin] == log_probs.argmax(-1))
        if self.has_equal_vocabulary:
            self._divergences.append(self._distributions.divergence(twin, log_probs))

    @property
    def kl(self) -> float | None:
        """Mean KL(first || second) of a token, in nats; None where the vocabularies or all ids differ."""
        return float(torch.cat(self._divergences).mean()) if self._divergences else None

    @property
    def kl_tokens(self) -> int:
        return sum(len(row) for row in self._divergences)

    @property
    def top_agreement(self) -> float | None:
        """The share of tokens whose likeliest successor is the same, 0 to 1; None where all ids differ."""
        return float(torch.cat(self._agreements).double().mean()) if self._agreements else None


def _key(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(example.input_ids), tuple(example.labels)


@torch.inference_mode()
def trained_log_probs(model: PreTrainedModel | PeftModel, example: Example) -> torch.Tensor:
    """Return the log-probabilities the model gives at the example's trained tokens, fp32 (tokens, vocabulary)."""
    before = [n - 1 for n, label in enumerate(example.labels) if label != NOT_TRAINED]
    ids = torch.tensor([example.input_ids], device=model.device)
    output = model(input_ids=ids, logits_to_keep=torch.tensor(before, device=model.device), use_cache=False)
    log_probs: torch.Tensor = output.logits[0].float().log_softmax(-1).cpu()
    return log_probs


def score(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    on_example: OnExample,
) -> Scores:
    """Score every example, and hand each on while its whole distributions are at hand.

    Raises ModelFault if a log-probability is NaN or infinite.
    """
    scores = Scores()
    for number, example in enumerate(examples):
        log_probs = trained_log_probs(model, example)
        labels = torch.tensor([label for label in example.labels if label != NOT_TRAINED])
        found = log_probs.gather(1, labels[:, None])[:, 0]
        if not found.isfinite().all():
            raise not_finite(model)
        scores.log_probs.append(found)
        scores.top.append(log_probs.argmax(-1))
        on_example(number, log_probs)
    return scores
