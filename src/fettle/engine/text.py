"""Text in, text out: an engine together with a tokenizer and its chat template.

With a chat template a prompt becomes a user turn; without one, or with `raw`, the prompt itself is continued. An answer
ends at the template's end-of-turn token as well as at the tokens in generation_config.json, as some checkpoints do not
list theirs. No other option of that file is used (such as a repetition penalty), so temperature 0 is greedy decoding
for every checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel

from fettle.data import Message, end_of_turn, generation_prompt
from fettle.data.tokenizer import Tokenizer
from fettle.data.values import require_shallow
from fettle.engine.base import Model, TokenEngine
from fettle.engine.request import Completion, Request, Sampling, ScoreRequest, TokenEvent
from fettle.errors import UserError, option

Prompt: TypeAlias = str | Sequence[Message]
"""A user's prompt, or the turns of a conversation."""

CONTEXT_TOKENS = 32
"""Tokens before the answer with which it is decoded, as some tokenizers drop the space before a text's first word."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a completion is. log_prob: of all its tokens together, in nats. is_greedy: whether greedy decoding
    gives it."""

    log_prob: float
    tokens: int
    is_greedy: bool


class Engine:
    """Answers and scores texts with one model.

    engine = fettle.Engine(*fettle.load("my-model"))
    engine.generate(["What is 2 + 2?", "Name a colour."])
    for piece in engine.stream("Tell me a story."):
        print(piece, end="")

    model: from `fettle.load`, or any causal language model of transformers. cache_bytes: memory for keys and values;
    None: a share of the free memory. running: requests that run at the same time at most. Transformers' own generation
    takes one at a time and ignores both. `tokens` is the engine below, which takes token ids.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        cache_bytes: int | None = None,
        running: int | None = None,
    ) -> None:
        for name, value in (("cache_bytes", cache_bytes), ("running", running)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} is {value!r}; expected a whole number from 1 on, or None.")
        self.model, self.tokenizer = model, tokenizer
        self.tokens = token_engine(model, cache_bytes=cache_bytes, running=running)
        self.stops = frozenset(stop_ids(self.tokens.stop_tokens, tokenizer))

    @property
    def context_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.tokens.context_tokens

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = Sampling(),  # frozen
        *,
        raw: bool = False,
        system: str | None = None,
        adapter: str | None = None,
    ) -> list[str]:
        """Return the answer to each prompt, without the prompt; with a seed, that of prompt n is drawn with seed + n.

        adapter: the name of one that the model has (`fettle.attach`); None: the active one; "": none.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; expected a list of prompts.")
        texts = [self.text_of(prompt, raw=raw, system=system) for prompt in prompts]
        return self.complete(texts, sampling, is_rendered=self.is_chat(raw), adapter=adapter)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),  # frozen
        *,
        raw: bool = False,
        system: str | None = None,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """Yield the answer to one prompt in pieces, as it is generated; closing the iterator stops it."""
        tokens = self.encode(self.text_of(prompt, raw=raw, system=system), is_rendered=self.is_chat(raw))
        pieces = Pieces(self.tokenizer, tokens)
        for event in self.tokens.stream(self.request(tokens, sampling, adapter)):
            if event.finish != "stop":
                yield pieces.add(event.token)
        yield pieces.rest()

    def score(self, pairs: Sequence[tuple[str, str]], *, adapter: str | None = None) -> list[Likelihood]:
        """Return how likely each completion is after its prompt, both taken as they are, without a chat template."""
        requests = []
        for prompt, completion in pairs:
            before = self.encode(prompt, is_rendered=False)
            tokens = self.encode(prompt + completion, is_rendered=False)
            if not 0 < len(before) < len(tokens):
                raise UserError(
                    f"{completion[:40]!r} after {prompt[-40:]!r} has no token of its own, or the prompt has none: they "
                    "must be split where a token ends, such as before a space."
                )
            positions = range(len(before), len(tokens))
            requests.append(ScoreRequest(tokens=tokens, positions=positions, adapter=adapter))
        return [
            Likelihood(
                float(scores.log_probs.double().sum()),
                len(request.positions),
                scores.top.tolist() == list(request.tokens[request.positions[0] :]),
            )
            for request, scores in zip(requests, self.tokens.score(requests), strict=True)
        ]

    def complete(
        self,
        texts: Sequence[str],
        sampling: Sampling,
        *,
        is_rendered: bool,
        on_answer: Callable[[int, str], None] | None = None,
        numbers: Sequence[int] | None = None,
        adapter: str | None = None,
    ) -> list[str]:
        """Return the continuation of each text, in order; with a seed, that of text n is drawn with seed + n.

        is_rendered: the texts come from a chat template, which has already added special tokens. on_answer: called with
        the place of a text and its continuation as soon as that is complete. numbers: of the texts, if they are part of
        a longer list; None: from 0 on.
        """
        prompts = [self.encode(text, is_rendered=is_rendered) for text in texts]
        requests = []
        for number, tokens in zip(numbers or range(len(prompts)), prompts, strict=True):
            if sampling.seed is not None and number:
                seed = (sampling.seed + number) % 2**32
                requests.append(self.request(tokens, replace(sampling, seed=seed), adapter))
            else:
                requests.append(self.request(tokens, sampling, adapter))
        running = [Completion() for _ in prompts]
        answers = [""] * len(prompts)

        def add(place: int, event: TokenEvent) -> None:
            running[place].add(event)
            if event.finish is not None:
                answers[place] = self._text_of(prompts[place], running[place])
                if on_answer is not None:
                    on_answer(place, answers[place])

        self.tokens.generate(requests, add)
        return answers

    def is_chat(self, raw: bool = False) -> bool:
        """Whether a prompt becomes a user turn."""
        return bool(self.tokenizer.chat_template) and not raw

    def text_of(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> str:
        """Return the text for the model to continue: the prompt in the chat template, or unchanged."""
        is_chat = self.is_chat(raw)
        require_shallow(prompt, "The request", "prompt")
        require_shallow(system, "The request", "system")
        if isinstance(prompt, str) and not prompt.strip():
            raise UserError("The prompt is empty; give at least one word.")
        if not is_chat:
            if system is not None:
                raise UserError(
                    f"{option('system')} needs a model with a chat template, and cannot be combined with "
                    f"{option('raw')}."
                )
            if not isinstance(prompt, str):
                raise UserError(f"{self.tokens.name} has no chat template; give a text instead of turns.")
            return prompt
        turns: list[Message] = [{"role": "system", "content": system}] if system else []
        turns += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return generation_prompt(self.tokenizer, turns)

    def encode(self, text: str, *, is_rendered: bool) -> list[int]:
        """Return the ids of a text; special tokens are added unless a chat template has done so."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=not is_rendered, verbose=False)["input_ids"]
        return ids

    def request(self, tokens: Sequence[int], sampling: Sampling, adapter: str | None = None) -> Request:
        """Return the request to continue `tokens` until an end-of-turn or end-of-text token."""
        return Request(tokens=tokens, sampling=sampling, stops=self.stops, adapter=adapter)

    def _text_of(self, prompt: Sequence[int], answer: Completion) -> str:
        tokens = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
        return Pieces(self.tokenizer, prompt).all(tokens)


class Pieces:
    """Turns the tokens of an answer into text, piece by piece: a character of several tokens comes with its last."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.before = list(prompt[-CONTEXT_TOKENS:])
        self.prefix = self._decode(self.before)
        self.tokens: list[int] = []
        self.told = 0
        """Characters of the answer that have been returned."""

    def add(self, token: int) -> str:
        """Return the text that `token` completes; empty if none."""
        self.tokens.append(token)
        text = self._whole()
        return "" if text.endswith("\ufffd") else self._news(text)

    def all(self, tokens: Sequence[int]) -> str:
        """Return the text of all tokens of an answer."""
        self.tokens.extend(tokens)
        return self.rest()

    def rest(self) -> str:
        """Return what has not been returned, such as an incomplete character."""
        return self._news(self._whole())

    def _whole(self) -> str:
        text = self._decode([*self.before, *self.tokens])
        return text[len(self.prefix) :] if text.startswith(self.prefix) else self._decode(self.tokens)

    def _news(self, text: str) -> str:
        new, self.told = text[self.told :], max(self.told, len(text))
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def token_engine(model: Model, *, cache_bytes: int | None = None, running: int | None = None) -> TokenEngine:
    """Return the engine for a model: fettle's own, transformers' for a family it does not have, llama.cpp's for a GGUF
    file."""
    from fettle.engine.scheduler import MOST_RUNNING
    from fettle.engine.torch_engine import TorchEngine
    from fettle.engine.transformers_engine import TransformersEngine
    from fettle.models.decoder import DecoderForCausalLM

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, DecoderForCausalLM):
        return TorchEngine(model, cache_bytes=cache_bytes, running=running or MOST_RUNNING)
    if isinstance(base, PreTrainedModel):
        return TransformersEngine(model)
    from fettle.engine.llama_cpp import engine as llama_cpp  # training needs no llama.cpp

    return llama_cpp.LlamaCppEngine(base, cache_bytes=cache_bytes, running=running or llama_cpp.MOST_RUNNING)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    raw: bool = False,
    system: str | None = None,
    sampling: Sampling = Sampling(),  # frozen
) -> str:
    """Return the completion of one prompt, without the prompt."""
    return Engine(model, tokenizer).generate([prompt], sampling, raw=raw, system=system)[0]


def stop_ids(named: int | list[int] | None, tokenizer: Tokenizer) -> list[int]:
    """Return the stop tokens: those of the generation config, the end of text, and the template's end of turn."""
    stops = [] if named is None else list(named) if isinstance(named, list) else [named]
    if wrong := [stop for stop in stops if type(stop) is not int or not 0 <= stop < 2**31]:
        raise UserError(f"generation_config.json: eos_token_id has {wrong[0]!r}; expected token ids.")
    ends = [tokenizer.eos_token, end_of_turn(tokenizer) if tokenizer.chat_template else None]
    found = (tokenizer.convert_tokens_to_ids(token) for token in ends if token is not None)
    return list(dict.fromkeys([*stops, *(index for index in found if index is not None)]))
