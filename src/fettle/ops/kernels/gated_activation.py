# mypy: allow-untyped-defs, allow-incomplete-defs
"""SwiGLU and GeGLU on the GPU: a program processes a block of one row."""

import torch
import triton
import triton.language as tl

BLOCK = 1024

SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
# Tensors come before these constants: the interpreter of Triton 3.7 takes a constant times a tensor for a constant.


@triton.jit
def _sigmoid(gate, IS_SILU: tl.constexpr):
    """Return the sigmoid s with activation(gate) = gate * s."""
    if IS_SILU:
        return tl.sigmoid(gate)
    return tl.sigmoid(gate * SLOPE * (gate * CUBIC * gate + 1.0))


@triton.jit
def gated_activation_forward_kernel(
    gate, gate_stride, up, up_stride, output, width, IS_SILU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    dtype = output.dtype.element_ty
    gates = tl.load(gate + row * gate_stride + columns, mask, 0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + columns, mask, 0.0).to(tl.float32)
    activated = (gates * _sigmoid(gates, IS_SILU)).to(dtype).to(tl.float32)  # rounded, as in PyTorch
    tl.store(output + row * width + columns, (activated * ups).to(dtype), mask)


@triton.jit
def gated_activation_backward_kernel(
    grad,
    grad_stride,
    gate,
    gate_stride,
    up,
    up_stride,
    grad_gate,
    grad_up,
    product,
    width,
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    dtype = product.dtype.element_ty
    grads = tl.load(grad + row * grad_stride + columns, mask, 0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + columns, mask, 0.0).to(tl.float32)
    ups = tl.load(up + row * up_stride + columns, mask, 0.0).to(tl.float32)
    sigmoid = _sigmoid(gates, IS_SILU)
    activated = gates * sigmoid
    slope = activated * (1.0 - sigmoid)
    if not IS_SILU:
        slope *= (gates * (3.0 * CUBIC) * gates + 1.0) * SLOPE
    out = row * width + columns
    tl.store(grad_gate + out, (grads * ups * (sigmoid + slope)).to(dtype), mask)
    tl.store(grad_up + out, (grads * activated).to(dtype), mask)
    tl.store(product + out, (activated.to(dtype).to(tl.float32) * ups).to(dtype), mask)


def gated_activation_forward(gate: torch.Tensor, up: torch.Tensor, activation_name: str) -> torch.Tensor:
    """Return `activation(gate) * up`. gate, up: (..., width)."""
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    inputs = _rows_and_strides(gate, up)
    _launch(gated_activation_forward_kernel, gate, (*inputs, output), activation_name)
    return output


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up, and the recomputed product. grad, gate, up: (..., width)."""
    grad_gate, grad_up, product = (
        torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(3)
    )
    inputs = _rows_and_strides(grad, gate, up)
    _launch(gated_activation_backward_kernel, gate, (*inputs, grad_gate, grad_up, product), activation_name)
    return grad_gate, grad_up, product


def _rows_and_strides(*tensors: torch.Tensor) -> list[torch.Tensor | int]:
    found: list[torch.Tensor | int] = []
    for tensor in tensors:
        rows = tensor.reshape(-1, tensor.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        found += [rows, rows.stride(0)]
    return found


def _launch(
    kernel: triton.JITFunction,
    like: torch.Tensor,
    arguments: tuple[torch.Tensor | int, ...],
    activation_name: str,
) -> None:
    width = like.shape[-1]
    if like.numel():
        with torch.cuda.device_of(like):
            grid = (like.numel() // width, triton.cdiv(width, BLOCK))
            kernel[grid](*arguments, width, activation_name == "silu", BLOCK, num_warps=4)
