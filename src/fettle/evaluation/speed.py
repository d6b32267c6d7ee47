"""Tokens per second for a single request: prompt processing, and generation token by token."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fettle.engine.base import TokenEngine
from fettle.engine.request import Request, Sampling

PROMPT_TOKENS, NEW_TOKENS = 512, 32
REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """The best of REPETITIONS, in tokens per second."""

    prompt: float
    generation: float


def measure_speed(engine: TokenEngine, ids: Sequence[int]) -> Speed:
    """Time the model on a prompt of at most PROMPT_TOKENS of `ids`, and on NEW_TOKENS generated after a few of them."""
    room = engine.context_tokens - NEW_TOKENS
    prompt = list(ids)[: max(1, min(PROMPT_TOKENS, room))]
    times = [_times(engine, prompt, number) for number in range(REPETITIONS + 1)][1:]  # the first warms up
    return Speed(len(prompt) / min(t for t, _ in times), (NEW_TOKENS - 1) / min(t for _, t in times))


def _times(engine: TokenEngine, prompt: list[int], number: int) -> tuple[float, float]:
    """Return the seconds for the prompt's first new token, and for the tokens after the first of a short prompt."""
    fresh = [(prompt[0] + number) % engine.vocab_size, *prompt[1:]]  # nothing of it is in the cache
    begun = time.perf_counter()
    engine.generate([Request(tokens=fresh, sampling=Sampling(max_new_tokens=1))])
    read = time.perf_counter() - begun
    stream = engine.stream(Request(tokens=prompt[:8], sampling=Sampling(max_new_tokens=NEW_TOKENS)))
    next(stream)
    begun = time.perf_counter()
    for _ in stream:
        pass
    return read, time.perf_counter() - begun
