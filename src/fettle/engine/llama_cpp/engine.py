"""The engine for GGUF files: several requests in one batch of llama.cpp, which may compute on a GPU.

Every sequence of the context is a place for a request. A place that is free keeps its tokens' keys and values, and a
new request takes over what its prompt begins with, such as the earlier turns of a chat.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from random import Random

import psutil
import torch

from fettle.engine.base import OnDistribution, TokenEngine, damaged
from fettle.engine.llama_cpp.context import (
    BATCH_TOKENS,
    Context,
    Part,
    common_length,
    context_tokens_for,
    is_long,
)
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.request import LONGEST_COMPLETION, Request, ScoreRequest, TextScores, TokenEvent
from fettle.engine.sampling import choose_tokens
from fettle.engine.scheduler import Running
from fettle.errors import UserError

MOST_RUNNING = 16
"""Requests that run at the same time by default."""

CACHE_SHARE = 0.5
"""Share of the free memory that keys and values may take by default."""


class LlamaCppEngine(TokenEngine):
    """Runs a GGUF file.

    cache_bytes: memory for keys and values; None: a share of the free memory. A request with more tokens than the
    context holds makes a larger one, once those before it have finished.
    """

    def __init__(
        self, file: GGUFFile, *, cache_bytes: int | None = None, running: int = MOST_RUNNING
    ) -> None:
        self.file, self.cache_bytes, self.most_running = file, cache_bytes, running
        self.name = str(file.path)
        self.context_tokens, self.vocab_size = file.context_length, file.vocab_size
        self.stop_tokens = file.stop_ids
        self._context: Context | None = None
        self._waiting: deque[Running] = deque()
        self._places: dict[int, Running] = {}
        """The running requests, in the order of their admission, by their sequence in the context."""
        self._submitted = 0

    # --- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        if request.adapter is not None:
            raise UserError(f"{self.name}: a GGUF file has no adapters; leave `adapter` out.")
        new_tokens = self.new_tokens(len(request.tokens), request.sampling)
        self.require_ids(request.tokens)
        self._require_memory(len(request.tokens) + new_tokens)
        number, self._submitted = self._submitted, self._submitted + 1
        random = Random(request.sampling.seed)
        self._waiting.append(Running(number, request, list(request.tokens), new_tokens, random=random))
        return number

    def cancel(self, number: int) -> None:
        self._waiting = deque(each for each in self._waiting if each.number != number)
        self._places = {place: each for place, each in self._places.items() if each.number != number}

    def _require_memory(self, tokens: int) -> None:
        needed = context_tokens_for(self.file, tokens) * self.file.cache_bytes_per_token
        if self.cache_bytes is not None and needed > self.cache_bytes:
            raise UserError(
                f"A key-value cache of {self.cache_bytes:,} bytes is too small for {tokens:,} tokens of {self.name}; "
                f"give it at least {needed:,} bytes."
            )

    # --- steps ---------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        self._admit()
        parts: list[Part] = []
        complete: list[Running] = []
        left = BATCH_TOKENS
        missing = {place: self._missing(place) for place in self._places}
        for place in sorted(missing, key=lambda place: len(missing[place])):  # answers before prompts
            new = missing[place][:left]
            is_complete = len(new) == len(missing[place])
            if new:
                parts.append(Part(place, new, [len(new) - 1] if is_complete else []))
                complete += [self._places[place]] if is_complete else []
                left -= len(new)
        if not parts or self._context is None:
            return []
        logits = self._context.run(parts)
        return self._collect(complete, logits) if complete else []

    def _missing(self, place: int) -> list[int]:
        assert self._context is not None
        return self._places[place].tokens[len(self._context.held[place]) :]

    def _collect(self, sequences: list[Running], logits: torch.Tensor) -> list[TokenEvent]:
        events = []
        chosen = choose_tokens(logits.clone(), sequences).tolist()
        for sequence, token, log_prob, largest in zip(sequences, *chosen, strict=True):
            if not -math.inf < largest < math.inf:  # also true for NaN
                raise damaged(self.name)
            finish = sequence.append(int(token))
            if finish is not None:
                self.cancel(sequence.number)
            wanted = log_prob if sequence.request.log_probs else None
            events.append(TokenEvent(sequence.number, int(token), wanted, finish))
        return events

    # --- places --------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give waiting requests places; those that the context does not fit wait until no other runs."""
        context = self._context
        self._wait(
            [p for p, each in self._places.items() if not (context and context.fits(len(each.tokens)))]
        )
        if not self._places and self._waiting:
            context = self._context_for_waiting()
        while context and self._waiting and context.fits(len(self._waiting[0].tokens)):
            free = [place for place in range(len(context.held)) if place not in self._places]
            if not free:
                break
            sequence = self._waiting.popleft()
            self._places[self._take_place(context, free, sequence.tokens)] = sequence

    def _wait(self, places: list[int]) -> None:
        """Let running requests wait; they are the next to be admitted and continue from their tokens."""
        self._waiting.extendleft([self._places.pop(place) for place in reversed(places)])

    def _take_place(self, context: Context, free: list[int], tokens: Sequence[int]) -> int:
        """Return the free place for a text, which keeps what some place holds of its beginning."""
        common = [common_length(held, tokens[:-1]) for held in context.held]
        place = max(free, key=lambda place: (common[place], -len(context.held[place])))
        best = max(range(len(common)), key=common.__getitem__)
        if common[best] > common[place]:
            context.copy(best, place)
        context.keep(place, common[best])
        return place

    def _context_for_waiting(self) -> Context:
        """Return a context for the first waiting request, and for those after it that need the same factors."""
        factors = is_long(self.file, len(self._waiting[0].tokens))
        alike = [each for each in self._waiting if is_long(self.file, len(each.tokens)) == factors]
        first = alike[: self.most_running]
        return self._context_for(max(map(self._expected_tokens, first)), len(first))

    def _expected_tokens(self, sequence: Running) -> int:
        """Return how many tokens to make a context for: with an answer of usual length, if that changes no factors."""
        length = len(sequence.tokens)
        longest = sequence.prompt_tokens + sequence.new_tokens
        if self.file.original_context is not None and length <= self.file.original_context:
            longest = min(longest, self.file.original_context)
        return min(longest, length + LONGEST_COMPLETION)

    def _context_for(self, tokens: int, places: int) -> Context:
        """Return a context for texts of `tokens` tokens, with `places` places or as many as the memory allows."""
        old, size = self._context, context_tokens_for(self.file, tokens)
        is_fitting = old is not None and old.fits(tokens)
        if old is not None and is_fitting:
            size = old.tokens
        budget = self.cache_bytes or int(CACHE_SHARE * psutil.virtual_memory().available)
        places = max(1, min(places, budget // (size * self.file.cache_bytes_per_token)))
        if old is not None and is_fitting and len(old.held) >= places:
            return old
        if old is not None:
            self._context = None
            old.close()
        self._context = Context(self.file, size, places)
        return self._context

    # --- scores --------------------------------------------------------------------------------------------

    def score(
        self, requests: Sequence[ScoreRequest], on_distribution: OnDistribution | None = None
    ) -> list[TextScores]:
        for request in requests:
            self.require_scorable(request)
            self.require_ids(request.tokens)
            self._require_memory(len(request.tokens))
        self._wait(list(self._places))
        found = []
        for number, request in enumerate(requests):
            parts, rows = [], []
            for log_probs, scores in self._scored(request):
                parts.append(scores)
                if on_distribution is not None:
                    rows.append(log_probs)
            found.append(TextScores.joined(parts))
            if on_distribution is not None:
                on_distribution(number, torch.cat(rows))
        return found

    def _scored(self, request: ScoreRequest) -> Iterator[tuple[torch.Tensor, TextScores]]:
        """Yield the log-probabilities, fp32 (positions, V), and the scores at the text's positions, in parts."""
        tokens = request.tokens
        context = self._context_for(len(tokens), 1)
        place = self._take_place(context, list(range(len(context.held))), tokens[: request.positions[0]])
        for begin in range(len(context.held[place]), len(tokens) - 1, BATCH_TOKENS):
            new = tokens[begin : begin + BATCH_TOKENS]
            positions = [p for p in request.positions if begin < p <= begin + len(new)]
            logits = context.run([Part(place, new, [p - 1 - begin for p in positions])])
            if positions:
                log_probs = logits.log_softmax(-1)
                scores = TextScores.of(log_probs, [tokens[p] for p in positions])
                if not scores.log_probs.isfinite().all():
                    raise damaged(self.name)
                yield log_probs, scores
