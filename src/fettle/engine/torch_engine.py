"""The engine for PyTorch models: continuous batching over a paged key-value cache.

Every step computes either the next chunks of waiting prompts or one token of every running sequence, and finished
sequences leave at once. The design follows Orca (Yu et al., 2022) and PagedAttention (Kwon et al., 2023, arXiv
2309.06180).
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from random import Random
from typing import cast

import psutil
import torch
from peft import PeftModel

from fettle.adapters.lora import require_mixable
from fettle.adapters.mixed import ModelAdapters
from fettle.engine.base import OnDistribution, TokenEngine, not_finite
from fettle.engine.pages import PAGE_SIZE, PagePool
from fettle.engine.request import Request, ScoreRequest, TextScores, TokenEvent
from fettle.engine.runner import Runner, cache_bytes_per_token, make_cache
from fettle.engine.sampling import choose_tokens
from fettle.engine.scheduler import MOST_RUNNING, STEP_TOKENS, Chunk, Root, Running, Scheduler
from fettle.errors import UserError
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.modes import evaluating

SCORED_TOKENS = 256
"""Positions whose logits are computed at a time, in fp32."""

CACHE_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Share of the free memory that the cache may take by default."""


class TorchEngine(TokenEngine):
    """Runs fettle's decoder, with its LoRA adapters as they are.

    cache_bytes: memory for keys and values; None: enough for MOST_RUNNING sequences of 2,048 tokens or the context, if
    that fits into a share of the free memory.
    """

    def __init__(
        self,
        model: DecoderForCausalLM | PeftModel,
        *,
        cache_bytes: int | None = None,
        running: int = MOST_RUNNING,
    ) -> None:
        self.model = model
        self.decoder = cast(
            DecoderForCausalLM, model.get_base_model() if isinstance(model, PeftModel) else model
        )
        self.name = str(self.decoder.name_or_path)
        self.context_tokens = self.decoder.config.max_position_embeddings
        self.vocab_size = self.decoder.config.vocab_size
        self.stop_tokens = self.decoder.generation_config.eos_token_id
        per_page = PAGE_SIZE * cache_bytes_per_token(self.decoder)
        if cache_bytes is None:
            usual = running * -(-min(self.context_tokens, 2048) // PAGE_SIZE)
            most = max(usual, -(-self.context_tokens // PAGE_SIZE))
            share = CACHE_SHARE[self.decoder.device.type] * _free_memory(self.decoder.device)
            pages = max(1, min(most, int(share) // per_page))
        else:
            pages = cache_bytes // per_page
            if pages < 1:
                raise UserError(
                    f"A key-value cache of {cache_bytes:,} bytes holds no tokens of {self.name}; "
                    f"give it at least {per_page:,} bytes."
                )
        cache = make_cache(self.decoder, pages) if cache_bytes is not None else None
        # less may be allowed than is free: by a limit of the process or of its container
        while cache is None:
            try:
                cache = make_cache(self.decoder, pages)
            except RuntimeError:  # torch.OutOfMemoryError is one too
                if pages == 1:
                    raise
                pages = max(1, pages // 2)
        self._runner = Runner(self.decoder, cache, ModelAdapters(model))
        self._scheduler = Scheduler(
            PagePool(pages),
            step_tokens=STEP_TOKENS[self.decoder.device.type],
            running=running,
            root_of=self._root_of,
        )
        self._sequences: dict[int, Running] = {}
        self._weights: Hashable = None
        """A fingerprint: keys and values of other weights are not used again."""
        self._mixable: Hashable = None
        """The adapters' identity when they were last found fit to run beside each other."""
        self._submitted = 0
        self._model_modules = list(model.modules())
        self._launched: _Launched | None = None
        """On a GPU, the step that runs while the CPU looks at the tokens of the one before it."""

    # --- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        return self._add(request, self.new_tokens(len(request.tokens), request.sampling))

    def cancel(self, number: int) -> None:
        if number in self._sequences:
            self._scheduler.finish(self._sequences.pop(number))

    def _add(self, request: Request, new_tokens: int, positions: Sequence[int] = ()) -> int:
        self.require_ids(request.tokens)
        self._note_changes()
        sequence = Running(
            self._submitted,
            request,
            list(request.tokens),
            new_tokens,
            positions,
            adapter=self._adapter_index(request.adapter),
            random=Random(request.sampling.seed),
        )
        self._scheduler.add(sequence)
        self._sequences[sequence.number] = sequence
        self._submitted += 1
        return sequence.number

    def _adapter_index(self, name: str | None) -> int:
        """Return the adapter's index among the model's; -1 for none. Raises UserError if the model has none like it."""
        adapters = self._runner.adapters
        if name is not None and isinstance(self.model, PeftModel) and self._mixable != adapters.identity():
            require_mixable(self.model)
            self._mixable = adapters.identity()
        name = adapters.active if name is None else name
        if name and name not in adapters.names:
            known = f"it has {', '.join(adapters.names)}" if adapters.names else "it has none"
            raise UserError(f"{self.name} has no adapter {name!r}; {known}.")
        return adapters.names.index(name) if name else -1

    def _root_of(self, sequence: Running) -> Root:
        is_long, longest = self.decoder.model.rotary_emb.factors_for(len(sequence.tokens))
        return Root((sequence.adapter, self._weights, is_long), longest)

    def _note_changes(self) -> None:
        """Note whether the model has been trained or switched since the last request, while none is running."""
        if not self._sequences:
            norm = float(self.decoder.model.norm.weight.detach().double().square().sum())
            self._weights = norm, self._runner.adapters.fingerprint()

    # --- steps ---------------------------------------------------------------------------------------------

    @contextmanager
    def ready(self) -> Iterator[None]:
        is_training = any(module.training for module in self._model_modules)
        with torch.inference_mode(), evaluating(self.model) if is_training else nullcontext():
            yield

    def step(self) -> list[TokenEvent]:
        with self.ready():
            launched, self._launched = self._launched, None
            if launched is None and (chunks := self._scheduler.next_chunks()):
                return self._prefill(chunks)
            if launched is None:
                launched = self._decode(self._scheduler.next_tokens())
            if self.decoder.device.type == "cuda" and not any(
                each.has_penalties for each in launched.sequences
            ):
                # the GPU computes the next step while the CPU looks at this one's tokens
                going_on = [each for each in launched.sequences if each.number in self._sequences]
                ahead = self._scheduler.next_tokens_ahead(going_on)
                self._launched = self._decode(ahead, launched) if ahead else None
            for sequence in launched.sequences:
                if sequence.number in self._sequences:
                    self._scheduler.note_computed(sequence, len(sequence.tokens))
            return self._collect(launched)

    def _prefill(self, chunks: list[Chunk]) -> list[TokenEvent]:
        return self._first_tokens(chunks, self._runner.prefill(chunks))

    def _first_tokens(self, chunks: list[Chunk], hidden: torch.Tensor) -> list[TokenEvent]:
        """Choose the token after every complete prompt. hidden: the decoder's output at the chunks' tokens."""
        ends = [n for n, chunk in zip(_ends(chunks), chunks, strict=True) if chunk.is_last]
        sequences = [chunk.sequence for chunk in chunks if chunk.is_last]
        if not sequences:
            return []
        return self._collect(
            _Launched(sequences, choose_tokens(self.decoder.logits(hidden[ends]).float(), sequences))
        )

    def _decode(self, sequences: list[Running], before: "_Launched | None" = None) -> "_Launched":
        """Start a step for the sequences; `before`: the step that computes their newest tokens, if not known yet."""
        if not sequences:
            return _Launched([], torch.empty(3, 0))
        newest = None if before is None else before.tokens_of(sequences)
        return _Launched(sequences, choose_tokens(self._runner.decode(sequences, newest), sequences))

    def _collect(self, launched: "_Launched") -> list[TokenEvent]:
        """Add the new tokens to their sequences, except to those that have ended since the step was started."""
        tokens, log_probs, largest = launched.read()
        events = []
        for sequence, chosen, log_prob, top in zip(
            launched.sequences, tokens, log_probs, largest, strict=True
        ):
            if sequence.number not in self._sequences:
                continue
            if not -math.inf < top < math.inf:  # also true for NaN
                raise not_finite(self.model)
            token, request = int(chosen), sequence.request
            if (finish := sequence.append(token)) is not None:
                self._scheduler.finish(self._sequences.pop(sequence.number))
            events.append(TokenEvent(sequence.number, token, log_prob if request.log_probs else None, finish))
        return events

    # --- scores --------------------------------------------------------------------------------------------

    def score(
        self, requests: Sequence[ScoreRequest], on_distribution: OnDistribution | None = None
    ) -> list[TextScores]:
        numbers: dict[int, int] = {}
        """From the sequence's number to the text's."""
        parts: list[list[TextScores]] = [[] for _ in requests]
        rows: list[list[torch.Tensor]] = [[] for _ in requests]
        try:
            for number, request in enumerate(requests):
                self.require_scorable(request)
                text = Request(tokens=request.tokens, adapter=request.adapter)
                numbers[self._add(text, 0, request.positions)] = number
            with self.ready():
                while numbers:
                    chunks = self._scheduler.next_chunks()
                    hidden = self._runner.prefill(chunks)
                    self._keep(self._first_tokens(chunks, hidden))  # of requests that wait at the same time
                    for chunk, end in zip(chunks, _ends(chunks), strict=True):
                        if (number := numbers.get(chunk.sequence.number, -1)) < 0:
                            continue
                        first = end + 1 - (chunk.end - chunk.begin)
                        for log_probs, scores in self._scored(chunk, hidden[first : end + 1]):
                            parts[number].append(scores)
                            if on_distribution is not None:
                                rows[number].append(log_probs.cpu())
                        if chunk.end == len(chunk.sequence.tokens):
                            self._scheduler.finish(self._sequences.pop(chunk.sequence.number))
                            del numbers[chunk.sequence.number]
                            if on_distribution is not None:
                                on_distribution(number, torch.cat(rows[number]))
                                rows[number] = []
        finally:
            for number in numbers:
                self.cancel(number)
        return [TextScores.joined(each) for each in parts]

    def _scored(self, chunk: Chunk, hidden: torch.Tensor) -> Iterator[tuple[torch.Tensor, TextScores]]:
        """Yield the log-probabilities, fp32 (positions, V), and the scores at the chunk's scored positions, in parts.

        hidden: the decoder's output at the chunk's tokens, (tokens, E).
        """
        tokens = chunk.sequence.tokens
        wanted = [p for p in chunk.sequence.positions if chunk.begin < p <= chunk.end]
        for begin in range(0, len(wanted), SCORED_TOKENS):
            positions = wanted[begin : begin + SCORED_TOKENS]
            log_probs = self.decoder.logits(hidden[[p - 1 - chunk.begin for p in positions]]).float()
            log_probs = log_probs.log_softmax(-1)
            scores = TextScores.of(log_probs, [tokens[p] for p in positions])
            if not scores.log_probs.isfinite().all():
                raise not_finite(self.model)
            yield log_probs, scores


class _Launched:
    """A step that has been started. choices: as from `choose_tokens`, on the device."""

    def __init__(self, sequences: list[Running], choices: torch.Tensor) -> None:
        self.sequences, self.choices = sequences, choices
        self.copied = choices
        self.done: torch.cuda.Event | None = None
        if choices.is_cuda:
            self.copied = torch.empty(choices.shape, dtype=choices.dtype, pin_memory=True)
            self.copied.copy_(choices, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> list[list[float]]:
        """Return the choices; the one place where the CPU waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        found: list[list[float]] = self.copied.tolist()
        return found

    def tokens_of(self, sequences: list[Running]) -> torch.Tensor:
        """Return the tokens of some of the sequences, in order, on the device."""
        tokens = self.choices[0]
        if len(sequences) < len(self.sequences):
            row = {id(sequence): n for n, sequence in enumerate(self.sequences)}
            rows = [row[id(sequence)] for sequence in sequences]
            tokens = tokens[torch.tensor(rows, device=tokens.device)]
        return tokens


def _ends(chunks: Sequence[Chunk]) -> list[int]:
    """Return the row of each chunk's last token among the tokens of all chunks."""
    ends, row = [], -1
    for chunk in chunks:
        row += chunk.end - chunk.begin
        ends.append(row)
    return ends


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
