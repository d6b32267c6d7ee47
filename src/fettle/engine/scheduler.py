"""Which sequences run in the next step: prompts in chunks, or one token of every running sequence.

A prompt is admitted when the cache has pages for all of it, so that it can always be computed. When a running
sequence needs a page and none is free, the youngest one loses its pages and waits again; its tokens are kept, so it
continues exactly where it was once its keys and values have been recomputed.
"""

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from fettle.engine.pages import PagePool
from fettle.engine.request import Finish, Request
from fettle.errors import UserError

MOST_RUNNING = 256
"""Sequences that run at the same time at most."""

STEP_TOKENS = {"cuda": 8192, "cpu": 1024}
"""Prompt tokens per step."""

PATIENCE = 4
"""Decode steps before a few waiting prompts are admitted: admitting more of them together costs fewer passes."""


class Root(NamedTuple):
    """What a sequence's keys and values depend on besides its tokens, as long as it has at most `longest` tokens."""

    key: Hashable
    longest: float = math.inf


@dataclass(slots=True, eq=False)
class Running:
    """A request while it runs. tokens: the prompt and the answer so far. cached: how many have keys and values.

    new_tokens: the most that the answer may have; 0 for a text that is only scored, at `positions`. adapter: its index
    among the model's adapters; -1 for none.
    """

    number: int
    request: Request
    tokens: list[int]
    new_tokens: int
    positions: Sequence[int] = ()
    adapter: int = -1
    root: Root = field(default_factory=lambda: Root(None))
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    random: Random = field(default_factory=Random)
    prompt_tokens: int = field(init=False)
    is_plain: bool = field(init=False)
    has_penalties: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens, self.is_plain = len(self.tokens), self.request.is_plain
        self.has_penalties = self.request.sampling.has_penalties

    def append(self, token: int) -> Finish | None:
        """Add a new token; return why the request ends with it, if it does."""
        self.tokens.append(token)
        if token in self.request.stops:
            return "stop"
        return "length" if len(self.tokens) == self.prompt_tokens + self.new_tokens else None

    @property
    def is_prompt_cached(self) -> bool:
        """Whether only the newest token has to be computed."""
        return self.cached == len(self.tokens) - 1 and len(self.tokens) > self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `begin` to `end` of a sequence, to be computed in one step."""

    sequence: Running
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the token after it is to be chosen."""
        return self.end == len(self.sequence.tokens) and self.sequence.new_tokens > 0


class Scheduler:
    """root_of: returns a sequence's root at its present length. When it outgrows that, it is computed anew."""

    def __init__(
        self,
        pool: PagePool,
        *,
        step_tokens: int,
        running: int,
        root_of: Callable[[Running], Root],
    ) -> None:
        self.pool, self.step_tokens, self.most_running, self.root_of = pool, step_tokens, running, root_of
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        """In the order of their admission."""
        self._decode_steps = 0

    def add(self, sequence: Running) -> None:
        """Queue a sequence. Raises UserError if the cache can never hold it."""
        needed = self.pool.pages_for(len(sequence.tokens) + max(0, sequence.new_tokens - 1))
        if needed > self.pool.pages:
            size = self.pool.page_size
            raise UserError(
                f"The key-value cache holds {self.pool.pages * size:,} tokens, but this request needs "
                f"{needed * size:,}: reduce the prompt or the new tokens, or give the cache more memory."
            )
        self.waiting.append(sequence)

    def next_chunks(self) -> list[Chunk]:
        """Return the prompts' tokens to compute in this step; empty if it is the turn of the running sequences."""
        begun = [each for each in self.running if not each.is_prompt_cached]
        has_place = self.waiting and len(self.running) < self.most_running
        places = min(len(self.waiting), self.most_running - len(self.running))
        is_due = 8 * places >= self.most_running or self._decode_steps >= PATIENCE
        if not begun and not (has_place and (is_due or not self.running)):
            return []
        left = self.step_tokens
        chunks: list[Chunk] = []
        for sequence in begun:
            left = self._add_chunk(sequence, left, chunks)
        while left > 0 and self.waiting and len(self.running) < self.most_running and self._admit():
            left = self._add_chunk(self.running[-1], left, chunks)
        if chunks:
            self._decode_steps = 0
        return chunks

    def next_tokens(self) -> list[Running]:
        """Return the sequences whose newest token is computed in this step, each with a page for it."""
        self._decode_steps += 1
        for sequence in [each for each in self.running if len(each.tokens) > each.root.longest]:
            self.preempt(sequence)
        ready: list[Running] = []
        size = self.pool.page_size
        for sequence in [each for each in self.running if each.is_prompt_cached]:
            if len(sequence.tokens) > size * len(sequence.pages):
                while not self.pool.free:
                    self.preempt(self.running[-1])
                if sequence not in self.running:  # it has been preempted, for an older one or for itself
                    break
                sequence.pages.append(self.pool.take())
            ready.append(sequence)
        return [each for each in ready if each.pages]

    def next_tokens_ahead(self, launched: Sequence[Running]) -> list[Running]:
        """Return the sequences to run in the step after `launched`, whose new tokens are not known yet.

        That is all of them but those that reach their maximum, each with a page for the new token. Empty if the next
        step depends on the tokens: if it is a prompt's turn, or a sequence loses its pages or changes its root.
        """
        if self.waiting and len(self.running) < self.most_running:
            return []
        ahead = [each for each in launched if len(each.tokens) + 1 < each.prompt_tokens + each.new_tokens]
        size = self.pool.page_size
        growing = [each for each in ahead if len(each.tokens) + 1 > size * len(each.pages)]
        if len(growing) > self.pool.free or any(len(each.tokens) + 1 > each.root.longest for each in ahead):
            return []
        for sequence in growing:
            sequence.pages.append(self.pool.take())
        self._decode_steps += 1
        return ahead

    def note_computed(self, sequence: Running, end: int) -> None:
        """Record that the tokens before `end` have keys and values, and let other sequences use them.

        A chunk is recorded when it is scheduled: every layer writes the new keys and values of all sequences before it
        reads any, so others may use them in the same step.
        """
        begin, size = sequence.cached, self.pool.page_size
        if begin // size < end // size:
            self.pool.publish(sequence.pages, sequence.tokens, sequence.root.key, begin=begin, end=end)
        sequence.cached = end

    def finish(self, sequence: Running) -> None:
        """Remove a sequence and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free(sequence)

    def preempt(self, sequence: Running) -> None:
        """Take a running sequence's pages; it is the next to be admitted."""
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Running) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0

    def _admit(self) -> bool:
        """Give the first waiting sequence its pages; return False if there are not enough."""
        sequence, size = self.waiting[0], self.pool.page_size
        sequence.root = self.root_of(sequence)
        shared = self.pool.find_prefix(sequence.tokens[: _reusable(sequence)], sequence.root.key)
        own = self.pool.pages_for(len(sequence.tokens)) - len(shared)
        # the others may need a page each before any of them ends
        reserve = min(len(self.running), self.pool.pages // 8)
        if own + self.pool.idle_among(shared) + reserve > self.pool.free:
            return False
        self.pool.use(shared)
        sequence.pages = [*shared, *(self.pool.take() for _ in range(own))]
        sequence.cached = len(shared) * size
        self.waiting.popleft()
        self.running.append(sequence)
        return True

    def _add_chunk(self, sequence: Running, left: int, chunks: list[Chunk]) -> int:
        """Add the sequence's next chunk of at most `left` tokens; return how many are left after it."""
        begin = sequence.cached
        end = min(len(sequence.tokens), begin + left)
        if end > begin:
            chunks.append(Chunk(sequence, begin, end))
            self.note_computed(sequence, end)
        return left - (end - begin)


def _reusable(sequence: Running) -> int:
    """Return how many tokens may come from the cache: what follows the last of them is to be computed."""
    return (sequence.positions[0] if sequence.positions else len(sequence.tokens)) - 1
