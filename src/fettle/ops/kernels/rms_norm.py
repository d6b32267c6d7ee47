# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMS norm on the GPU: a program holds a few whole rows at a time; in backward it loops over several such groups.

So each program accumulates its rows' share of the weight's gradient, without atomics, and results are reproducible.
"""

import torch
import triton
import triton.language as tl

TILE = 1024  # minimum values per program: one row of a model's width, or several of a head's
PROGRAMS = 512  # each leaves one partial weight gradient, summed afterwards


@triton.jit
def rms_norm_forward_kernel(
    x, x_stride, weight, output, rstd, rows, hidden, eps,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < hidden)
    values = tl.load(x + row * x_stride + column, mask, 0.0).to(tl.float32)
    scale = tl.load(weight + column, column < hidden, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / hidden + eps)
    normalized = values * inverse
    if OFFSET:
        product = normalized * (1.0 + scale)
    else:  # rounded before the product, as in Llama
        product = normalized.to(output.dtype.element_ty).to(tl.float32) * scale
    tl.store(output + row * hidden + column, product.to(output.dtype.element_ty), mask)
    tl.store(rstd + row, inverse, row < rows)


@triton.jit
def rms_norm_backward_kernel(
    grad, grad_stride, x, x_stride, weight, rstd, grad_x, partials, rows, hidden,
    OFFSET: tl.constexpr, NEEDS_WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, column < hidden, 0.0).to(tl.float32)
    if OFFSET:
        scale += 1.0
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column < hidden)
        inverse = tl.load(rstd + row, row < rows, 0.0)
        normalized = tl.load(x + row * x_stride + column, mask, 0.0).to(tl.float32) * inverse
        grads = tl.load(grad + row * grad_stride + column, mask, 0.0).to(tl.float32)
        if NEEDS_WEIGHT_GRAD:
            grad_weight += grads * normalized
        grads *= scale
        mean = tl.sum(grads * normalized, 1, keep_dims=True) / hidden
        result = (grads - normalized * mean) * inverse
        tl.store(grad_x + row * hidden + column, result.to(grad_x.dtype.element_ty), mask)
    if NEEDS_WEIGHT_GRAD:
        partial = tl.sum(grad_weight, 0, keep_dims=True)
        tl.store(partials + tl.program_id(0).to(tl.int64) * hidden + column, partial, column < hidden)


def layout(hidden: int) -> dict[str, int]:
    """Return the rows per program, their padded width, and the number of warps (8 values per thread)."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, rows * block // 256)}


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and each row's fp32 1 / sqrt(mean(x^2) + eps). x: (rows, hidden)."""
    x, weight = _unit_stride(x), weight.contiguous()
    rows, hidden = x.shape
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    options = layout(hidden)
    if rows:
        with torch.cuda.device_of(x):
            rms_norm_forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
                x, x.stride(0), weight, output, rstd, rows, hidden, eps, offset, **options
            )
    return output, rstd


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: bool,
    needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of x and, where needed, of weight. grad, x: (rows, hidden)."""
    grad, x, weight = _unit_stride(grad), _unit_stride(x), weight.contiguous()
    rows, hidden = x.shape
    options = layout(hidden)
    programs = triton.cdiv(rows, options["ROWS"])
    if needs_weight_grad:
        programs = min(programs, PROGRAMS)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    partials = torch.empty(programs if needs_weight_grad else 0, hidden, dtype=torch.float32, device=x.device)
    if rows:
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(programs,)](
                *(grad, grad.stride(0), x, x.stride(0), weight, rstd, grad_x, partials),
                *(rows, hidden, offset, needs_weight_grad),
                **options,
            )
    return grad_x, partials.sum(0).to(weight.dtype) if needs_weight_grad else None


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
