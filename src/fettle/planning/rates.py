"""The speed of a device for one model, from which the plan computes the seconds of policies and tokens."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fettle.recompute.policies import Policy


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = fixed + per_token * tokens."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> "Line":
        """Return the line through two (tokens, seconds) points, with both parts clamped to 0 or more against noise."""
        (tokens, seconds), (more_tokens, more_seconds) = first, second
        per_token = max(0.0, more_seconds - seconds) / (more_tokens - tokens)
        per_token = min(per_token, more_seconds / more_tokens)
        return cls(more_seconds - per_token * more_tokens, per_token)

    def at(self, tokens: int) -> float:
        """Return the seconds at this many tokens."""
        return self.fixed + self.per_token * tokens

    def __add__(self, other: "Line") -> "Line":
        return Line(self.fixed + other.fixed, self.per_token + other.per_token)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of a model's parts.

    layers: forward and backward pass of one layer without its attention, by policy. attention: one visible (query, key)
    pair, all heads, by document length. head: seconds per labelled token. products: floating-point operations per
    second of bare matrix products. update: seconds of the optimizer per trained element.
    """

    layers: dict[Policy, Line]
    attention: dict[int, "PairSeconds"]
    head: float
    products: float
    update: float

    def as_figures(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        layers = {policy.name: asdict(line) for policy, line in self.layers.items()}
        attention = {str(tokens): asdict(pair) for tokens, pair in self.attention.items()}
        others = {"head": self.head, "products": self.products, "update": self.update}
        return {"layers": layers, "attention": attention, **others}

    @classmethod
    def from_figures(cls, figures: Mapping[str, Any]) -> "Rates":
        """Return the inverse of `as_figures`."""
        layers = {Policy[policy]: Line(**line) for policy, line in figures["layers"].items()}
        attention = {int(tokens): PairSeconds(**pair) for tokens, pair in figures["attention"].items()}
        return cls(**{**figures, "layers": layers, "attention": attention})

    def attention_of(self, tokens: int) -> "PairSeconds":
        """Return the figures of the shortest measured document of at least `tokens` tokens, else of the longest."""
        return self.attention[min((n for n in self.attention if n >= tokens), default=max(self.attention))]


@dataclass(frozen=True, slots=True)
class PairSeconds:
    """Seconds of attention per visible (query, key) pair, all heads."""

    forward: float
    backward: float

    def of(self, policy: Policy) -> float:
        """Return the seconds per pair under this policy, which may run attention's forward pass twice."""
        passes = 1 if policy.attention else 2
        return passes * self.forward + self.backward


def visible_pairs(tokens: int, window: int | None) -> float:
    """Return the number of (query, key) pairs in a causal document with a sliding window of `window` tokens, if any."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * float(window)
