"""The engine for any other transformers model: its own `generate`, one request at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fettle.engine.base import OnDistribution, TokenEngine, not_finite
from fettle.engine.request import Finish, Request, Sampling, ScoreRequest, TextScores, TokenEvent
from fettle.errors import UserError
from fettle.models.modes import evaluating


class TransformersEngine(TokenEngine):
    """Runs a stock model of a family that fettle's decoder does not have. A request's tokens arrive all at once."""

    def __init__(self, model: Any) -> None:
        self.model: PreTrainedModel = model
        self.name = str(model.name_or_path)
        self.context_tokens = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.stop_tokens = model.generation_config.eos_token_id
        self._waiting: OrderedDict[int, tuple[Request, int]] = OrderedDict()
        self._submitted = 0

    def submit(self, request: Request) -> int:
        if request.adapter is not None:
            raise UserError(
                f"{self.name}: this model runs with its active adapter only; leave `adapter` out."
            )
        new_tokens = self.new_tokens(len(request.tokens), request.sampling)
        self.require_ids(request.tokens)
        number, self._submitted = self._submitted, self._submitted + 1
        self._waiting[number] = request, new_tokens
        return number

    def cancel(self, number: int) -> None:
        self._waiting.pop(number, None)

    def step(self) -> list[TokenEvent]:
        if not self._waiting:
            return []
        number, (request, new_tokens) = self._waiting.popitem(last=False)
        watch = _Watch(self, request.log_probs)
        ids = torch.tensor([list(request.tokens)], device=self.model.device)
        config = GenerationConfig(
            max_new_tokens=new_tokens,
            eos_token_id=sorted(request.stops) or None,
            pad_token_id=0,
            **_options(request.sampling),
        )
        with (
            torch.inference_mode(),
            evaluating(self.model),
            self._own_options(config),
            torch.random.fork_rng(),
        ):
            if request.sampling.seed is not None:
                torch.manual_seed(request.sampling.seed)
            output: Any = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([watch]),
            )
        tokens = output[0, len(request.tokens) :].tolist()
        log_probs = watch.log_probs_of(tokens) if request.log_probs else [None] * len(tokens)
        events = [TokenEvent(number, *pair) for pair in zip(tokens, log_probs, strict=True)]
        finish: Finish = "stop" if tokens[-1] in request.stops else "length"
        return [*events[:-1], TokenEvent(number, tokens[-1], log_probs[-1], finish)]

    def score(
        self, requests: Sequence[ScoreRequest], on_distribution: OnDistribution | None = None
    ) -> list[TextScores]:
        found = []
        for number, request in enumerate(requests):
            self.require_scorable(request)
            self.require_ids(request.tokens)
            ids = torch.tensor([list(request.tokens)], device=self.model.device)
            before = torch.tensor([position - 1 for position in request.positions], device=ids.device)
            with torch.inference_mode(), evaluating(self.model):
                logits = self.model(input_ids=ids, logits_to_keep=before, use_cache=False).logits[0]
            log_probs = logits.float().log_softmax(-1).cpu()
            scores = TextScores.of(log_probs, [request.tokens[position] for position in request.positions])
            if not scores.log_probs.isfinite().all():
                raise not_finite(self.model)
            found.append(scores)
            if on_distribution is not None:
                on_distribution(number, log_probs)
        return found

    @contextmanager
    def _own_options(self, config: GenerationConfig) -> Iterator[None]:
        """Replace the model's generation config, whose penalties `generate` would apply too."""
        original, self.model.generation_config = self.model.generation_config, config
        try:
            yield
        finally:
            self.model.generation_config = original


class _Watch(LogitsProcessor):
    """Changes nothing; raises ModelFault for NaN or Inf, and keeps the log-probabilities if asked to."""

    def __init__(self, engine: TransformersEngine, keep: bool) -> None:
        self.engine, self.keep = engine, keep
        self.rows: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(-1).isfinite().all():
            raise not_finite(self.engine.model)
        if self.keep:
            self.rows.append(scores[0].float().log_softmax(-1).cpu())
        return scores

    def log_probs_of(self, tokens: Sequence[int]) -> list[float]:
        return [float(row[token]) for row, token in zip(self.rows, tokens, strict=True)]


def _options(sampling: Sampling) -> dict[str, Any]:
    """Return a GenerationConfig's options for `sampling`."""
    if sampling.presence_penalty or sampling.frequency_penalty:
        raise UserError(
            "presence_penalty and frequency_penalty need a model of a family that fettle supports."
        )
    options: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
    if sampling.logit_bias:
        options["sequence_bias"] = [[[token], bias] for token, bias in sampling.logit_bias.items()]
    if not sampling.is_greedy:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        options |= {"top_p": sampling.top_p, "min_p": sampling.min_p or None}
    return options
