"""Decides between the plain PyTorch path and the Triton kernels; nothing else in fettle.ops asks."""

import functools
import importlib.util
import os

import torch

OLDEST = {torch.float32: (7, 5), torch.float16: (7, 5), torch.bfloat16: (8, 0)}
"""The kernels' dtypes, with the compute capability that their arithmetic begins at."""


def uses_triton(tensor: torch.Tensor) -> bool:
    """Say whether a Triton kernel can work on `tensor`: on a GPU, or anywhere under Triton's interpreter.

    The interpreter runs where TRITON_INTERPRET=1 stood in the environment before a kernel was imported.
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


def uses_flash_attention(query: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention-2 takes `query` (..., D): 16 bits, D up to 256, Ampere or later."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    channels = query.shape[-1]
    return channels <= 256 and channels % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)
