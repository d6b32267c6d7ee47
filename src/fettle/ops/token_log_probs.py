"""Log-probabilities of given next tokens, without materializing the logits of all tokens at once.

    logits = (cap * tanh(h W^T / cap) or h W^T) / temperature;  log_prob = logits[label] - logsumexp(logits)

Tokens are processed in chunks with logits of (chunk, V). With a frozen head the gradient of a log-probability with
respect to its hidden state, (onehot - softmax) W, is computed in the forward pass, while the chunk's logits exist, and
backward only scales it: two passes of products instead of three. Saved for backward in that case: this gradient,
(T, E). With a trainable head: h, W and labels; the logits are recomputed.

A chunk is computed in place, in buffers that the next chunk reuses: twice the size of its logits, three times with a
soft cap. If products run in another dtype than the head's (`dispatch.product_dtype`), it is converted in slices.

Shapes: T tokens, E hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fettle.ops.dispatch import product_dtype
from fettle.ops.scratch import scratch

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**26}
"""Size of the fp32 logits of a chunk."""
FEWEST_TOKENS = 64
"""Minimum tokens per chunk, whatever their logits' size: each chunk reads the whole head twice. With a vocabulary of
256,000 and 32 tokens per chunk that took a third of a step on a CPU."""

SLICE = 4096
"""Rows of the head converted at a time."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of each label: log_probs (with gradient) and, without, entropy, mean_logits and log_sum_sq_probs (the logarithm
    of the sum of all squared probabilities), in fp32, and is_top1, whether it is the most likely token. All are (T,).
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    is_top1: torch.Tensor


def token_log_probs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> TokenScores:
    """Compute the formula above in plain PyTorch: the specification of `token_log_probs`."""
    logits = (hidden @ weight.T).float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits / temperature
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return TokenScores(
        log_probs.gather(1, labels[:, None])[:, 0],
        entropy.detach(),
        logits.mean(-1).detach(),
        (2 * log_probs).logsumexp(-1).detach(),
        logits.argmax(-1) == labels,
    )


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> TokenScores:
    """Score `labels` (T,) for `hidden` (T, E) with the head `weight` (V, E) of the same dtype; both get gradients."""
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype} and the head {weight.dtype}"
    return TokenScores(*_TokenLogProbs.apply(hidden, weight, labels, softcap, temperature))


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        temperature: float,
    ) -> tuple[torch.Tensor, ...]:
        is_trained, has_gradient = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        log_probs = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        entropy, mean, log_sum_sq = (torch.empty_like(log_probs) for _ in range(3))
        is_top1 = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        slope = torch.empty_like(hidden) if has_gradient and not is_trained else None
        with _buffers(hidden, weight, softcap) as buffers:
            for chunk in _chunks(hidden, weight):
                logits, spare = _logits(hidden[chunk], weight, softcap, buffers)  # (chunk, V) each
                is_top1[chunk] = logits.argmax(-1) == labels[chunk]
                if slope is not None:  # before the logits are overwritten
                    factor = _cap_slope(logits, softcap, buffers)
                if temperature != 1:
                    logits.div_(temperature)
                label_logits = logits.gather(1, labels[chunk, None])[:, 0]
                mean[chunk] = logits.mean(-1)
                highest = logits.amax(-1, keepdim=True)
                total = torch.sub(logits, highest, out=spare).exp_().sum(-1)
                logsumexp = total.log_().add_(highest[:, 0])
                log_probs[chunk] = label_logits - logsumexp
                each_log_prob = logits.sub_(
                    logsumexp[:, None]
                )  # the logits become log-probabilities in place
                probs = torch.exp(each_log_prob, out=spare)
                log_sum_sq[chunk] = torch.linalg.vector_norm(probs, dim=-1).log_().mul_(2)
                entropy[chunk] = probs.mul_(each_log_prob).sum(-1).neg_()
                if slope is not None:  # and now probabilities, and then the gradient of the logits
                    grad_logits = _score_gradient(each_log_prob.exp_(), labels[chunk], factor, temperature)
                    _times_head(grad_logits, weight, buffers, out=slope[chunk])
        ctx.softcap, ctx.temperature = softcap, temperature
        ctx.save_for_backward(*((hidden, weight, labels) if is_trained else (slope,)))
        others = (entropy, mean, log_sum_sq, is_top1)
        ctx.mark_non_differentiable(*others)
        return log_probs, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0]
        if not ctx.needs_input_grad[1]:
            (slope,) = ctx.saved_tensors
            return (slope * grad[:, None]).to(slope.dtype), None, None, None, None
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        with _buffers(hidden, weight, ctx.softcap) as buffers:
            for chunk in _chunks(hidden, weight):
                logits, _ = _logits(hidden[chunk], weight, ctx.softcap, buffers)
                factor = _cap_slope(logits, ctx.softcap, buffers)
                probs = torch.softmax(logits.div_(ctx.temperature), -1)
                slope = _score_gradient(probs, labels[chunk], factor, ctx.temperature)
                grad_logits = slope.mul_(grad[chunk, None])
                _times_head(grad_logits, weight, buffers, out=grad_hidden[chunk])
                dtype = product_dtype(hidden[chunk])
                grad_weight += (grad_logits.to(dtype).T @ hidden[chunk].to(dtype)).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Buffers for one chunk, reused by the next. logits, spare and slope (of the cap): (chunk, V), fp32 or fp64;
    rows: (SLICE, E), in the products' dtype, for a converted slice of the head."""

    logits: torch.Tensor
    spare: torch.Tensor
    slope: torch.Tensor | None
    rows: torch.Tensor | None


def buffer_shapes(
    tokens: int, weight_shape: tuple[int, int], *, is_capped: bool, is_converted: bool
) -> list[torch.Size]:
    """Return the shapes of a chunk's buffers, in the logits' dtype: logits, spare, the cap's slope, converted slice."""
    vocabulary, hidden = weight_shape
    shapes = [torch.Size((tokens, vocabulary))] * (3 if is_capped else 2)
    return shapes + ([torch.Size((min(SLICE, vocabulary), hidden))] if is_converted else [])


@contextmanager
def _buffers(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> Iterator[_Buffers]:
    tokens = min(len(hidden), chunk_tokens(len(weight), hidden.device.type))
    is_converted = product_dtype(hidden) != weight.dtype
    shape = (weight.shape[0], weight.shape[1])
    shapes = buffer_shapes(tokens, shape, is_capped=softcap is not None, is_converted=is_converted)
    with scratch(shapes, _wide(hidden), hidden.device) as found:
        rows = found.pop() if is_converted else None
        yield _Buffers(found[0], found[1], None if softcap is None else found[2], rows)


def _wide(hidden: torch.Tensor) -> torch.dtype:
    """Return the logits' dtype: fp32, or fp64 if the head is."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, buffers: _Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h W^T, capped, in fp32 (or fp64), and a spare buffer; both (chunk, V). hidden: (chunk, E)."""
    logits, spare = buffers.logits[: len(hidden)], buffers.spare[: len(hidden)]
    if buffers.rows is not None:
        rows = hidden.to(logits.dtype)
        for part, out in zip(weight.split(SLICE), logits.split(SLICE, dim=1), strict=True):
            torch.mm(rows, buffers.rows[: len(part)].copy_(part).T, out=out)
    elif logits.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        logits.copy_(torch.mm(hidden, weight.T, out=_narrowed(spare, weight.dtype)))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits, spare


def _times_head(
    grad_logits: torch.Tensor, weight: torch.Tensor, buffers: _Buffers, *, out: torch.Tensor
) -> None:
    """Write grad_logits W to `out`. grad_logits: (chunk, V); out: (chunk, E), in the head's dtype."""
    if buffers.rows is not None:
        total = torch.zeros_like(out, dtype=grad_logits.dtype)
        for part, grad in zip(weight.split(SLICE), grad_logits.split(SLICE, dim=1), strict=True):
            total.addmm_(grad, buffers.rows[: len(part)].copy_(part))
        out.copy_(total)
        return
    if grad_logits.dtype != weight.dtype:
        grad_logits = _narrowed(buffers.spare[: len(grad_logits)], weight.dtype).copy_(grad_logits)
    torch.mm(grad_logits, weight, out=out)


def _narrowed(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the beginning of `memory`, contiguous, as a tensor of the same shape in a narrower dtype."""
    return memory.view(-1).view(dtype)[: memory.numel()].view(memory.shape)


def _cap_slope(capped: torch.Tensor, softcap: float | None, buffers: _Buffers) -> torch.Tensor | None:
    """Return the derivative of the soft cap at the logits with result `capped`: 1 - (capped / softcap)^2."""
    if softcap is None or buffers.slope is None:
        return None
    return torch.div(capped, softcap, out=buffers.slope[: len(capped)]).square_().neg_().add_(1)


def _score_gradient(
    probs: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Return (onehot - probs) * factor / temperature, in place of `probs` (chunk, V). factor: the soft cap's
    derivative."""
    slope = probs.neg_()
    slope[torch.arange(len(labels), device=labels.device), labels] += 1
    slope = slope if factor is None else slope.mul_(factor)
    return slope if temperature == 1 else slope.div_(temperature)


def chunk_tokens(vocabulary: int, device_type: str) -> int:
    """Return the number of tokens per chunk."""
    return max(FEWEST_TOKENS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = chunk_tokens(weight.shape[0], hidden.device.type)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]
