"""What every engine offers: token ids in, token ids and log-probabilities out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fettle.engine.request import (
    LONGEST_COMPLETION,
    Completion,
    Request,
    Sampling,
    ScoreRequest,
    TextScores,
    TokenEvent,
)
from fettle.errors import ModelFault, UserError, option

if TYPE_CHECKING:
    from fettle.engine.llama_cpp.gguf_file import GGUFFile  # which training does not need

Model: TypeAlias = "PreTrainedModel | PeftModel | GGUFFile"

OnEvent: TypeAlias = Callable[[int, TokenEvent], None]
"""Called with a request's place in the list and its new token."""
OnDistribution: TypeAlias = Callable[[int, torch.Tensor], None]
"""Called with a text's number and its log-probabilities, fp32 (positions, vocabulary) on the CPU."""


class TokenEngine(ABC):
    """Runs requests. Each is independent of the others: the same tokens and seed give the same answer."""

    name: str
    """Of the model, for messages."""
    context_tokens: int
    vocab_size: int
    stop_tokens: Any
    """The ids at which an answer ends as the model's files have them: a list, one, or None."""

    @abstractmethod
    def submit(self, request: Request) -> int:
        """Queue a request and return its number. Raises UserError if it can never run."""

    @abstractmethod
    def step(self) -> list[TokenEvent]:
        """Compute one step for the queued requests; return their new tokens."""

    @abstractmethod
    def cancel(self, number: int) -> None:
        """Forget a request that has not finished."""

    @abstractmethod
    def score(
        self, requests: Sequence[ScoreRequest], on_distribution: OnDistribution | None = None
    ) -> list[TextScores]:
        """Return the scores of each text, in order. Raises ModelFault for NaN or Inf."""

    def ready(self) -> AbstractContextManager[None]:
        """Put the model into the state that `step` needs, for several steps."""
        return nullcontext()

    def generate(self, requests: Sequence[Request], on_event: OnEvent | None = None) -> list[Completion]:
        """Return the answer of each request, in order. on_event: called for every new token.

        If it ends early (Ctrl-C), unfinished requests are cancelled. Raises UserError for a request that can never
        run, before any of them runs.
        """
        answers = [Completion() for _ in requests]
        places: dict[int, int] = {}
        """Of the unfinished requests in the list, by their numbers."""
        try:
            for place, request in enumerate(requests):
                places[self.submit(request)] = place
            with self.ready():
                while places:
                    for event in self._events_of(places):
                        place = places[event.request]
                        answers[place].add(event)
                        if event.finish is not None:
                            del places[event.request]
                        if on_event is not None:
                            on_event(place, event)
        finally:
            for number in places:
                self.cancel(number)
                self._undelivered.pop(number, None)
        return answers

    @cached_property
    def _undelivered(self) -> dict[int, list[TokenEvent]]:
        """New tokens, by request, that were computed while the caller waited for those of others."""
        return {}

    def _events_of(self, numbers: Container[int]) -> list[TokenEvent]:
        """Compute one step unless there are undelivered tokens of the requests; return their new tokens."""
        if not any(number in numbers for number in self._undelivered):
            self._keep(self.step())
        mine = [number for number in self._undelivered if number in numbers]
        return [event for number in mine for event in self._undelivered.pop(number)]

    def _keep(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self._undelivered.setdefault(event.request, []).append(event)

    def stream(self, request: Request) -> Iterator[TokenEvent]:
        """Yield the new tokens of one request as they are computed; closing the iterator cancels it."""
        number, is_finished = self.submit(request), False
        try:
            # not within `ready`, which changes the state of the caller between two tokens
            while not is_finished:
                for event in self._events_of((number,)):
                    is_finished = event.finish is not None
                    yield event
        finally:
            self._undelivered.pop(number, None)
            if not is_finished:
                self.cancel(number)

    def new_tokens(self, prompt_tokens: int, sampling: Sampling) -> int:
        """Return how many tokens may follow the prompt. Raises UserError if the context is too short for them."""
        if prompt_tokens == 0:
            raise UserError("The prompt has no tokens; give at least one word.")
        left = self.context_tokens - prompt_tokens
        if left < 1 and sampling.max_new_tokens is None:
            raise UserError(
                f"The prompt has {prompt_tokens} tokens, which leaves no room for an answer in the model's context of "
                f"{self.context_tokens} tokens; shorten it."
            )
        wanted = sampling.max_new_tokens or min(left, LONGEST_COMPLETION)
        if wanted > left:
            raise UserError(
                f"The prompt's {prompt_tokens} tokens and {wanted} new tokens ({option('max_new_tokens')}) exceed "
                f"the model's context of {self.context_tokens} tokens; reduce one of them."
            )
        return wanted

    def require_ids(self, tokens: Sequence[int]) -> None:
        """Raise UserError for a token that is not in the vocabulary."""
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"The prompt has the token id {token}; {self.name} has ids from 0 to {self.vocab_size - 1}."
                )

    def require_scorable(self, request: ScoreRequest) -> None:
        """Raise UserError for a text that is longer than the context, and for positions outside of it."""
        if len(request.tokens) > self.context_tokens:
            raise UserError(
                f"A text to score has {len(request.tokens):,} tokens, more than the context of "
                f"{self.context_tokens:,}; shorten it."
            )
        if not request.positions or not 1 <= min(request.positions) <= max(request.positions) < len(
            request.tokens
        ):
            raise UserError(
                f"A text of {len(request.tokens)} tokens cannot be scored at {list(request.positions)[:5]}; expected "
                "positions from 1 to its last token."
            )


def not_finite(model: Any) -> ModelFault:
    """Return the error for a PyTorch model whose logits are NaN or Inf."""
    cure = "fetch or export it again"
    if model.dtype == torch.float16:
        cure += f", or use {option('dtype')} float32, as float16 may overflow"
    whose = " or those of its adapter" if hasattr(model, "peft_config") else ""
    return damaged(model.name_or_path, whose, cure)


def damaged(name: str, whose: str = "", cure: str = "fetch or export it again") -> ModelFault:
    """Return the error for a model whose logits are NaN or Inf."""
    return ModelFault(
        f"{name}: the model's logits are NaN or Inf, so its weights{whose} are damaged: {cure}."
    )
