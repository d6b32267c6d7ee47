"""Choose the next token of every sequence, on the device of the logits and without waiting for it.

A sampled token is found by inverting the cumulative distribution at one uniform number, which comes from the request's
own generator. So a request's tokens depend on its seed alone, whatever else is in the batch.

Shapes: S sequences, V tokens in the vocabulary.
"""

from collections.abc import Sequence

import torch

from fettle.engine.request import Request
from fettle.engine.scheduler import Running

LARGEST_UNIFORM = 1 - 2**-22
"""Below 1 by more than the rounding of a product in fp32, so that no token beyond the last possible one is chosen."""


def choose_tokens(logits: torch.Tensor, sequences: Sequence[Running]) -> torch.Tensor:
    """Return, fp64 (3, S): the chosen tokens, their log-probabilities, and the largest logit, which shows NaN and Inf.

    logits: fp32 (S, V). The log-probabilities are those of the unchanged logits, and meaningless if no request asks for
    them.
    """
    largest, tokens = logits.max(-1)
    if all(sequence.is_plain for sequence in sequences):
        return torch.stack((tokens.double(), largest.double(), largest.double()))
    requests = [sequence.request for sequence in sequences]
    for row, (sequence, request) in enumerate(zip(sequences, requests, strict=True)):
        if request.sampling.has_penalties and request.sampling.is_greedy:
            tokens[row] = _penalized(logits[row], sequence).argmax()
    sampled = [row for row, request in enumerate(requests) if not request.sampling.is_greedy]
    # which of the two ways a row goes depends on its own options alone, so that its result does too
    for is_sorted in (False, True):
        rows = [row for row in sampled if _needs_order(requests[row]) == is_sorted]
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = _sample(logits[index], [sequences[row] for row in rows], is_sorted=is_sorted)
    if any(request.log_probs for request in requests):
        log_probs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    else:
        log_probs = largest
    return torch.stack((tokens.double(), log_probs.double(), largest.double()))


def _needs_order(request: Request) -> bool:
    return request.sampling.top_k > 0 or request.sampling.top_p < 1


def _penalized(logits: torch.Tensor, sequence: Running) -> torch.Tensor:
    """Return one sequence's logits (V,) with bias and penalties, as new memory."""
    sampling, logits = sequence.request.sampling, logits.clone()
    if sampling.logit_bias:
        index = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[index] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=logits.device)
        found, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(found > 0, found / penalty, found * penalty)
    answer = sequence.tokens[sequence.prompt_tokens :]
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        seen, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def _sample(logits: torch.Tensor, sequences: Sequence[Running], *, is_sorted: bool) -> torch.Tensor:
    """Return a token per row, (S,). is_sorted: apply top_k and top_p, which need the tokens in order."""
    samplings = [sequence.request.sampling for sequence in sequences]
    for row, sequence in enumerate(sequences):
        if samplings[row].has_penalties:
            logits[row] = _penalized(logits[row], sequence)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    scores = logits / column([each.temperature for each in samplings])
    order = None
    if is_sorted:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(scores.shape[1], device=logits.device)
        most = column([min(each.top_k or scores.shape[1], scores.shape[1]) for each in samplings])
        scores = scores.masked_fill(rank >= most, -torch.inf)
    probs = scores.softmax(-1)
    if order is not None:
        before = probs.cumsum(-1) - probs  # a token is kept if those before it do not reach top_p yet
        probs = probs.masked_fill(before >= column([each.top_p for each in samplings]), 0)
    if any(each.min_p for each in samplings):
        floor = column([each.min_p for each in samplings]) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0)
    cumulative = probs.cumsum(-1)
    uniform = column([min(sequence.random.random(), LARGEST_UNIFORM) for sequence in sequences])
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    chosen = chosen.clamp_(max=cumulative.shape[1] - 1)
    return (chosen if order is None else order.gather(1, chosen))[:, 0]
