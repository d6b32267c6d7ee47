"""What an engine is asked and what it answers, in token ids."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from fettle.errors import UserError, option

COLDEST = 1e-6
"""Lower temperatures count as 0, as logits divided by them overflow."""

LONGEST_COMPLETION = 512
"""Default for the maximum number of new tokens."""

Finish = Literal["stop", "length"]
"""Why a request ended: at one of its stop tokens, or at its maximum number of new tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0: greedy decoding.

    The filters apply in this order: logit_bias and penalties; temperature; top_k (0: off), top_p and min_p (the least
    probability, relative to that of the most likely token). repetition_penalty divides positive and multiplies negative
    logits of every token of the prompt and the answer (Keskar et al., 2019, arXiv 1909.05858); presence_penalty and
    frequency_penalty are subtracted once, and once per occurrence, for tokens of the answer.

    max_new_tokens: None means LONGEST_COMPLETION, or the rest of the context if that is less. seed: the same seed gives
    the same tokens, whatever other requests run; None draws one.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy decoding) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p < 1, "0 (off) or more, below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32, f"a whole number from 0 to {2**32 - 1}"),
        ):
            if not is_valid:
                raise UserError(f"{option(name)} is {getattr(self, name)}; expected {expected}.")
        if any(math.isnan(bias) for bias in self.logit_bias.values()):
            raise UserError(f"{option('logit_bias')} has NaN; expected numbers.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= COLDEST

    @property
    def has_penalties(self) -> bool:
        return bool(
            self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text to continue.

    tokens: the prompt, at least one. stops: generation ends at any of these tokens, which is part of the answer.
    log_probs: report each new token's log-probability, before temperature and filters. adapter: the name of an
    adapter that the model has (`fettle.attach`); None: the active one; "": none.
    """

    tokens: Sequence[int]
    sampling: Sampling = Sampling()
    stops: frozenset[int] = frozenset()
    log_probs: bool = False
    adapter: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether each new token is that of the largest logit, and nothing else is wanted."""
        return self.sampling.is_greedy and not self.sampling.has_penalties and not self.log_probs


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One text to score: the log-probabilities of its tokens at `positions` (ascending, from 1 on) given those before
    them."""

    tokens: Sequence[int]
    positions: Sequence[int]
    adapter: str | None = None


class TokenEvent(NamedTuple):
    """One new token of a request; `finish` is set with its last one."""

    request: int
    token: int
    log_prob: float | None = None
    finish: Finish | None = None


@dataclass(slots=True)
class Completion:
    """The new tokens of one request. log_probs is empty unless they were asked for."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, event: TokenEvent) -> None:
        self.tokens.append(event.token)
        if event.log_prob is not None:
            self.log_probs.append(event.log_prob)
        self.finish = event.finish


@dataclass(frozen=True, slots=True)
class TextScores:
    """The scores of one text, both (positions,). log_probs: fp32, in nats. top: the most likely tokens, int64."""

    log_probs: torch.Tensor
    top: torch.Tensor

    @classmethod
    def of(cls, log_probs: torch.Tensor, labels: Sequence[int]) -> "TextScores":
        """Return the scores of `labels`. log_probs: fp32 (positions, vocabulary)."""
        index = torch.tensor(labels, device=log_probs.device)[:, None]
        return cls(log_probs.gather(1, index)[:, 0].cpu(), log_probs.argmax(-1).cpu())

    @classmethod
    def joined(cls, parts: Sequence["TextScores"]) -> "TextScores":
        """Return the scores of one text that was scored in parts."""
        return cls(torch.cat([part.log_probs for part in parts]), torch.cat([part.top for part in parts]))
