"""Timing of the parts that every model's step consists of, on random data."""

import time
from collections.abc import Callable

import torch

from fettle.ops.attention import Documents, packed_attention
from fettle.ops.dispatch import best_product_dtype
from fettle.planning.rates import PairSeconds, visible_pairs

LONG_SECONDS = 3.0


def seconds_of(run: Callable[[], object], device: torch.device, enough_seconds: float = 0.3) -> float:
    """Return the seconds of the shortest of up to ten runs.

    Stops after `enough_seconds` in total, but makes at least two runs unless the first takes longer than LONG_SECONDS,
    over which noise averages out. The device is synchronized before and after each run.
    """
    best, began = float("inf"), time.perf_counter()
    for count in range(10):
        enough = LONG_SECONDS if count == 1 else enough_seconds
        if count >= 1 and time.perf_counter() - began > enough:
            break
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_attention(
    tokens: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    enough_seconds: float = 0.3,
) -> PairSeconds:
    """Return the seconds per visible pair, from one document of `tokens` tokens without a sliding window.

    heads: (query heads, key-value heads). size: channels per head.
    """
    query_heads, key_heads = heads
    make = ((tokens, query_heads, size), (tokens, key_heads, size), (tokens, key_heads, size))
    query, key, value = (torch.randn(s, device=device).to(dtype).requires_grad_() for s in make)
    is_start = torch.zeros(tokens, dtype=torch.bool, device=device)
    is_start[0] = True
    documents = Documents.from_starts(is_start)

    def forward() -> torch.Tensor:
        return packed_attention(query, key, value, documents, scale=size**-0.5)

    def backward() -> None:
        torch.autograd.grad(total, (query, key, value), retain_graph=True)

    # a scalar: for any other output PyTorch's gradient check imports sympy, which takes a second
    total = (forward() * torch.randn_like(query)).sum()
    backward()
    pairs = visible_pairs(tokens, None)
    return PairSeconds(
        seconds_of(forward, device, enough_seconds) / pairs,
        seconds_of(backward, device, enough_seconds) / pairs,
    )


def time_product(
    rows: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    enough_seconds: float = 0.3,
) -> float:
    """Return the floating-point operations per second of a linear layer's product and its input's gradient.

    Runs in the dtype that the ops use for products of `dtype`.
    """
    dtype = best_product_dtype(device.type, dtype)
    x, grad = (torch.randn(rows, width, device=device).to(dtype) for width in (inputs, outputs))
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    forward, backward = lambda: x @ weight.T, lambda: grad @ weight
    seconds = sum(seconds_of(run, device, enough_seconds) for run in (forward, backward))
    return 4 * rows * inputs * outputs / seconds


def time_update(device: torch.device) -> float:
    """Return the seconds of AdamW per trained element.

    Runs its arithmetic directly, because importing torch's optimizer takes seconds.
    """
    parameter, mean, square = (torch.zeros(1 << 20, device=device) for _ in range(3))
    grad = torch.full_like(parameter, 0.1)

    def step() -> None:
        mean.lerp_(grad, 0.1)
        square.mul_(0.999).addcmul_(grad, grad, value=0.001)
        parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-1e-3)

    step()
    return seconds_of(step, device, 0.1) / parameter.numel()
