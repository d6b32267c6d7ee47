"""What a model's head says of given next tokens, without its logits ever existing for all of them at once.

    logits = cap * tanh(h W^T / cap) or h W^T;  log_prob = logits[label] - logsumexp(logits)

Work goes in chunks of tokens, (chunk, V) each. With a frozen head the gradient of a log-probability by its
hidden state, (onehot - softmax) W, is taken in the forward pass already, while the chunk's logits are at hand,
and backward only scales it: two passes of products instead of three. Saved for backward then: that gradient,
(T, E). With a trainable head: h, W and labels; the logits are redone.

Where products run in another dtype than the head's (`dispatch.product_dtype`), it is converted slice by slice.

Shapes: T tokens, E hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import product_dtype

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**26}
"""Of fp32 logits in a chunk."""
FEWEST_TOKENS = 64
"""In a chunk, whatever they take: each chunk reads the whole head twice. With 256,000 words and half as many tokens
that was a third of a step on a CPU."""

SLICE = 4096
"""Rows of the head that are converted at a time."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """log_probs (with gradient) and entropy (without): fp32 (T,), in nats; is_top1: bool (T,), whether the
    label is the most likely token."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def token_log_probs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None = None
) -> TokenScores:
    """The formula above in plain PyTorch: the specification of `token_log_probs`."""
    logits = _cap((hidden @ weight.T).float(), softcap)
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return TokenScores(
        log_probs.gather(1, labels[:, None])[:, 0], entropy.detach(), logits.argmax(-1) == labels
    )


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None = None
) -> TokenScores:
    """Score `labels` (T,) after `hidden` (T, E) with the head `weight` (V, E), of one dtype; gradients flow to both."""
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype} and the head {weight.dtype}"
    log_probs, entropy, is_top1 = _TokenLogProbs.apply(hidden, weight, labels, softcap)
    return TokenScores(log_probs, entropy, is_top1)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
    ) -> tuple[torch.Tensor, ...]:
        is_trained, has_gradient = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        slope = torch.empty_like(hidden) if has_gradient and not is_trained else None
        for chunk in _chunks(hidden, weight):
            logits = _cap(_logits(hidden[chunk], weight), softcap)
            is_top1[chunk] = logits.argmax(-1) == labels[chunk]
            label_logits = logits.gather(1, labels[chunk, None])[:, 0]
            factor = None if slope is None else _cap_slope(logits, softcap)
            logsumexp = torch.logsumexp(logits, -1)
            probs = logits.sub_(logsumexp[:, None])
            log_probs[chunk] = label_logits - logsumexp
            entropy[chunk] = probs.exp().mul_(probs).sum(-1).neg_()
            if slope is not None:
                grad_logits = _score_gradient(probs.exp_(), labels[chunk], factor)
                _times_head(grad_logits, weight, out=slope[chunk])
        ctx.softcap = softcap
        ctx.save_for_backward(*((hidden, weight, labels) if is_trained else (slope,)))
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0]
        if not ctx.needs_input_grad[1]:
            (slope,) = ctx.saved_tensors
            return (slope * grad[:, None]).to(slope.dtype), None, None, None
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for chunk in _chunks(hidden, weight):
            logits = _cap(_logits(hidden[chunk], weight), ctx.softcap)
            factor = _cap_slope(logits, ctx.softcap)
            slope = _score_gradient(torch.softmax(logits, -1), labels[chunk], factor)
            grad_logits = slope.mul_(grad[chunk, None])
            _times_head(grad_logits, weight, out=grad_hidden[chunk])
            dtype = product_dtype(hidden[chunk])
            grad_weight += (grad_logits.to(dtype).T @ hidden[chunk].to(dtype)).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """H W^T in fp32 (or fp64), (chunk, V)."""
    dtype = product_dtype(hidden)
    if dtype == weight.dtype:
        return (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32))
    logits, rows = hidden.new_empty(len(hidden), len(weight), dtype=dtype), hidden.to(dtype)
    for part, out in zip(weight.split(SLICE), logits.split(SLICE, dim=1), strict=True):
        torch.mm(rows, part.to(dtype).T, out=out)
    return logits


def _times_head(grad_logits: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> None:
    """Put grad_logits W into `out`. grad_logits: (chunk, V); out: (chunk, E), of the head's dtype."""
    dtype = product_dtype(out)
    if dtype == weight.dtype:
        torch.mm(grad_logits.to(dtype), weight, out=out)
        return
    total = torch.zeros_like(out, dtype=dtype)
    for part, grad in zip(weight.split(SLICE), grad_logits.split(SLICE, dim=1), strict=True):
        total.addmm_(grad, part.to(dtype))
    out.copy_(total)


def _cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _cap_slope(capped: torch.Tensor, softcap: float | None) -> torch.Tensor | None:
    """The soft cap's slope where it gave `capped`: 1 - tanh^2."""
    return None if softcap is None else 1 - (capped / softcap).square_()


def _score_gradient(probs: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """(onehot - probs) * factor, in place of `probs` (chunk, V). factor: the soft cap's slope."""
    slope = probs.neg_()
    slope[torch.arange(len(labels), device=labels.device), labels] += 1
    return slope if factor is None else slope.mul_(factor)


def chunk_tokens(vocabulary: int, device_type: str) -> int:
    """How many tokens' logits are made at a time."""
    return max(FEWEST_TOKENS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = chunk_tokens(weight.shape[0], hidden.device.type)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
