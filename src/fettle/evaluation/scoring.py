"""Score rows token by token with one model, and measure the distance of a second model from the first.

For every trained token of the first model, its log-probability and the most likely token are kept. The full
distribution, which the KL divergence needs, is kept for at most KL_TOKENS evenly spaced tokens, in a file. So only one
model is in memory at a time, and a vocabulary of 256,000 takes at most 4.3 GB of disk.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from fettle.data import Example
from fettle.data.tokenize import NOT_TRAINED
from fettle.engine.base import TokenEngine
from fettle.engine.request import ScoreRequest
from fettle.files import require_free_space
from fettle.ops.kl_divergence import kl_divergence

OnExample: TypeAlias = Callable[[int, torch.Tensor], None]
"""Called with an example's number and log-probabilities at its trained tokens, fp32 (trained tokens, vocabulary)."""

KL_TOKENS = 4096
"""Maximum number of distributions kept of the first model."""

CHUNK_TOKENS = 64
"""Distributions compared at a time, in fp64."""


@dataclass(slots=True)
class Scores:
    """One model's scores. Per example: log_probs, in nats, and top, the most likely tokens; both (trained tokens,)."""

    log_probs: list[torch.Tensor] = field(default_factory=list)
    top: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.log_probs)

    @property
    def loss(self) -> float:
        """Return the mean negative log-probability per trained token, in nats."""
        return -math.fsum(float(row.double().sum()) for row in self.log_probs) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class Distributions:
    """The first model's log-probabilities over the vocabulary at some of the tokens, fp32, in a temporary file."""

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
        """Store the distributions of example `number`; log_probs: (trained tokens, vocabulary)."""
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
    """The distance of a second model from the first, on examples with the same ids and labels for both."""

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
        """Number of examples whose ids or labels differ from the first model's."""
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
        """Return the mean KL(first || second) per token, in nats; None if the vocabularies or all ids differ."""
        return float(torch.cat(self._divergences).mean()) if self._divergences else None

    @property
    def kl_tokens(self) -> int:
        return sum(len(row) for row in self._divergences)

    @property
    def top_agreement(self) -> float | None:
        """Return the top-1 agreement: the share of positions with the same most likely token, 0 to 1; None if all
        ids differ."""
        return float(torch.cat(self._agreements).double().mean()) if self._agreements else None


def _key(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(example.input_ids), tuple(example.labels)


def score(engine: TokenEngine, examples: Sequence[Example], on_example: OnExample) -> Scores:
    """Score every example, and call `on_example` with its full distributions.

    Raises ModelFault if a log-probability is NaN or Inf.
    """
    requests = [
        ScoreRequest(
            tokens=example.input_ids,
            positions=[n for n, label in enumerate(example.labels) if label != NOT_TRAINED],
        )
        for example in examples
    ]
    found = engine.score(requests, on_example)
    return Scores([each.log_probs for each in found], [each.top for each in found])
