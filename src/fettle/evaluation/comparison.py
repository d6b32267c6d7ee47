"""The result of a comparison, as plain data and as JSON."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model. perplexity: over its `tokens` trained tokens. exact_share: the share of its answers that match the
    row's exactly, 0 to 1; None if no row has a comparable answer."""

    name: str
    runtime: str
    perplexity: float
    tokens: int
    exact_share: float | None
    size_bytes: int
    prompt_tokens_per_second: float
    generated_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on the same rows.

    kl: mean KL(a || b) per token, in nats, over kl_tokens tokens. top_agreement: the share of positions where both
    predict the same most likely token. equal_answers: the share of identical texts among the `answers` that both gave;
    tokens_before_difference: the mean length of their common prefix. None: left out; `notes` say why.
    """

    rows: int
    a: Side
    b: Side
    kl: float | None
    kl_tokens: int
    top_agreement: float | None
    answers: int
    equal_answers: float | None
    tokens_before_difference: float | None
    notes: tuple[str, ...] = ()

    def as_json(self) -> str:
        """Return everything as JSON, with NaN and Inf, which JSON does not have, as null."""
        return json.dumps(_finite(asdict(self)), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
