"""The only place that decides by device and dtype: plain PyTorch or a Triton kernel, and the dtype of products."""

import functools
import importlib.util
import os
import platform

import torch

OLDEST = {torch.float32: (7, 5), torch.float16: (7, 5), torch.bfloat16: (8, 0)}
"""The kernels' dtypes, with the lowest compute capability that supports their arithmetic."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel can run on `tensor`: on a GPU, or on any device in Triton's interpreter.

    The interpreter is used if TRITON_INTERPRET=1 was set in the environment before a kernel was imported.
    """
    if tensor.dtype not in OLDEST or not _has_triton():
        return False
    if tensor.is_cuda:
        return _capability(tensor.device) >= OLDEST[tensor.dtype]
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


FEW_ROWS = 32
"""For fewer rows an emulated product costs less than widening its matrix. A matrix of 3,072 by 9,216 on 2 Zen 3 cores,
emulated bf16 and fp32: 18 and 88 ms for one row, 75 and 162 for 16, 522 and 272 for 128, 2,235 and 436 for 512; the
input's gradient for 1,024 rows 135 s and 0.6 s."""


def product_dtype(x: torch.Tensor, *, has_gradient: bool = True) -> torch.dtype:
    """Return the dtype in which to multiply `x` (rows, inputs) by a matrix of the same dtype.

    With a gradient to compute, few rows are no exception, as the product for the gradient would be emulated too.
    """
    is_quick = len(x) < FEW_ROWS and not has_gradient
    return x.dtype if is_quick else best_product_dtype(x.device.type, x.dtype)


def best_product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or fp32 on a CPU that would emulate it: all CPUs emulate fp16, and many laptops bf16."""
    is_emulated = dtype == torch.float16 or (dtype == torch.bfloat16 and not has_bf16_products())
    return torch.float32 if device_type == "cpu" and is_emulated else dtype


WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA that disable bf16 instructions in oneDNN, which computes PyTorch's products."""


@functools.cache
def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware: with AVX512-BF16 or AMX on x86.

    PyTorch's own check is true for every x86 CPU with AVX-512, most of which emulate bf16, slower than fp32.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def uses_cudnn_attention(query: torch.Tensor) -> bool:
    """Whether cuDNN's attention supports `query` (T, H, D) and is faster: on Hopper and later, D up to 128."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[0] < 2:
        return False
    channels = query.shape[-1]
    return channels <= 128 and channels % 8 == 0 and _capability(query.device) >= (9, 0)


def uses_flash_attention(query: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention-2 supports `query` (..., D): 16 bits, D up to 256, Ampere or later."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    channels = query.shape[-1]
    return channels <= 256 and channels % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)
