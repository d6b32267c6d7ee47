"""The NF4 kernel against the layout written out in plain PyTorch, bit for bit."""

import pytest
import torch

TABLE = torch.linspace(-1, 1, 16) ** 3  # any 16 numbers


def packed_weights(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, and the bytes that hold them: the earlier weight's code in the high half."""
    codes = torch.randint(16, (size + size % 2,), dtype=torch.uint8)
    return codes[:size].long(), codes[0::2] * 16 + codes[1::2]


def unpack(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    return TABLE[codes] * absmax.repeat_interleave(64)[: len(codes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (1,), (3, 21), (65, 33), (0, 4)], ids=str)
def test_plain_absmax(kernel_device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from fettle.ops.kernels.nf4 import nf4_dequantize

    size = torch.Size(shape).numel()
    codes, packed = packed_weights(size)
    absmax = torch.rand(-(-size // 64))
    on_device = (t.to(kernel_device) for t in (packed, absmax, TABLE))
    found = nf4_dequantize(*on_device, shape, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), unpack(codes, absmax).view(shape).to(dtype))


@pytest.mark.parametrize("shape", [(64, 64), (3, 21), (257, 129)], ids=str)
def test_double_quantised_absmax(kernel_device: str, shape: tuple[int, ...]) -> None:
    from fettle.ops.kernels.nf4 import nf4_dequantize

    size = torch.Size(shape).numel()
    codes, packed = packed_weights(size)
    absmax_codes = torch.randint(256, (-(-size // 64),), dtype=torch.uint8)
    code_book, nested_absmax, offset = torch.randn(256), torch.rand(-(-size // 64 // 256)), 0.1234567
    nested = nested_absmax.repeat_interleave(256)[: len(absmax_codes)]
    absmax = code_book[absmax_codes.long()] * nested + torch.tensor(offset)

    packed, absmax_codes, table, code_book, nested_absmax = (
        t.to(kernel_device) for t in (packed, absmax_codes, TABLE, code_book, nested_absmax)
    )
    found = nf4_dequantize(
        packed, absmax_codes, table, shape, torch.float32, nested=(code_book, nested_absmax, offset)
    )
    expected = unpack(codes, absmax).view(shape)
    # The interpreter and the GPU (whose fusion of product and sum is switched off) round alike.
    assert torch.equal(found.cpu(), expected)
