"""How fast a device is at one model: what the plan turns policies and tokens into seconds with."""

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
        """Both (tokens, seconds). Neither part is negative: noise may tilt the line too far."""
        (tokens, seconds), (more_tokens, more_seconds) = first, second
        per_token = max(0.0, more_seconds - seconds) / (more_tokens - tokens)
        per_token = min(per_token, more_seconds / more_tokens)
        return cls(more_seconds - per_token * more_tokens, per_token)

    def at(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def __add__(self, other: "Line") -> "Line":
        return Line(self.fixed + other.fixed, self.per_token + other.per_token)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of a model's parts. layers: forward and backward pass of one layer without its attention, by policy.
    attention: of one pair of tokens that see each other, all heads, by the length of their document. head: seconds per
    labelled token. products: operations per second of bare matrix products. update: seconds of the optimiser per
    trained element."""

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
        """Undo `as_figures`."""
        layers = {Policy[policy]: Line(**line) for policy, line in figures["layers"].items()}
        attention = {int(tokens): PairSeconds(**pair) for tokens, pair in figures["attention"].items()}
        return cls(**{**figures, "layers": layers, "attention": attention})

    def attention_of(self, tokens: int) -> "PairSeconds":
        """That of the shortest measured document that is as long, or of the longest."""
        return self.attention[min((n for n in self.attention if n >= tokens), default=max(self.attention))]


@dataclass(frozen=True, slots=True)
class PairSeconds:
    """Seconds of attention for one pair of tokens that see each other."""

    forward: float
    backward: float

    def of(self, policy: Policy) -> float:
        """What a layer with this policy spends: attention's forward pass is recomputed with the whole layer."""
        passes = 1 if policy.attention else 2
        return passes * self.forward + self.backward


def visible_pairs(tokens: int, window: int | None) -> float:
    """Pairs (query, key) of a causal document, over the last `window` tokens."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * float(window)
