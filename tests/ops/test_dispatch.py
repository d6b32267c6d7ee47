"""Products where a CPU has no bf16 arithmetic: fp32 inside, the caller's dtype outside."""

import platform

import pytest
import torch

from fettle.ops import dispatch
from fettle.ops.attention import Documents, packed_attention, packed_attention_reference
from fettle.ops.dispatch import FEW_ROWS, product_dtype
from fettle.ops.lora_linear import LowRank, Projection, lora_linear, lora_linear_reference
from fettle.ops.lora_mlp import MLP, lora_mlp, lora_mlp_reference
from fettle.ops.nf4 import nf4_dequantize, nf4_quantize
from fettle.ops.token_log_probs import token_log_probs, token_log_probs_reference
from fettle.quantization.nf4 import Nf4Linear

TOKENS = FEW_ROWS + 1
BF16_ROUNDING = 2**-6


@pytest.fixture(params=[False, True], ids=["in fp32", "in bf16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(dispatch, "has_bf16_products", lambda: request.param)
    return request.param


def require_close(ours, reference, *inputs: torch.Tensor) -> None:
    """Output and gradients in bf16 within bf16's rounding of the reference in fp64."""
    found, exact = (_run(ours, inputs, torch.bfloat16), _run(reference, inputs, torch.float64))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double() - other).norm() / other.norm()) < BF16_ROUNDING


def _run(function, inputs, dtype: torch.dtype) -> list[torch.Tensor]:
    given = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
    output = function(*given)
    torch.manual_seed(1)
    weights = torch.randn(output.shape).bfloat16().to(dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), given)]


def test_types_are_chosen_by_the_cpu_and_the_rows(has_bf16: bool) -> None:
    for dtype, expected in (
        (torch.bfloat16, torch.bfloat16 if has_bf16 else torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert product_dtype(torch.empty(FEW_ROWS, 4, dtype=dtype)) == expected
        assert product_dtype(torch.empty(FEW_ROWS - 1, 4, dtype=dtype)) == expected
        assert product_dtype(torch.empty(FEW_ROWS - 1, 4, dtype=dtype), has_gradient=False) == dtype
    assert product_dtype(torch.empty(FEW_ROWS, 4, dtype=torch.float16, device="meta")) == torch.float16


def test_a_linear_layer(has_bf16: bool) -> None:
    weight, bias = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16()

    def reference(x, a, b):
        return lora_linear_reference(x, weight.to(x.dtype), bias.to(x.dtype), a, b, 0.5)

    inputs = torch.randn(TOKENS, 16), torch.randn(4, 16), torch.randn(24, 4)
    require_close(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.5), reference, *inputs)


@pytest.mark.parametrize("keep", ["gates", "input"])
def test_an_mlp(has_bf16: bool, keep) -> None:
    gate_up, down = torch.randn(48, 16).bfloat16() / 4, torch.randn(16, 24).bfloat16() / 5

    def mlp(a, b) -> MLP:
        update = LowRank(a, b, 0.5)
        return MLP((Projection(gate_up.to(a.dtype), update),), Projection(down.to(a.dtype), None), "silu")

    inputs = torch.randn(TOKENS, 16), torch.randn(4, 16) / 4, torch.randn(48, 4) / 2
    require_close(
        lambda x, a, b: lora_mlp(x, mlp(a, b), keep=keep),
        lambda x, a, b: lora_mlp_reference(x, mlp(a, b)),
        *inputs,
    )


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("tokens", [TOKENS, 600])
def test_attention(has_bf16: bool, softcap, tokens) -> None:
    is_start = torch.zeros(tokens, dtype=torch.bool)
    is_start[0] = True
    rules = {"documents": Documents.from_starts(is_start), "scale": 0.3, "softcap": softcap}
    inputs = torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16)
    require_close(
        lambda q, k, v: packed_attention(q, k, v, **rules),
        lambda q, k, v: packed_attention_reference(q, k, v, **rules),
        *inputs,
    )


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_head(has_bf16: bool, is_trained: bool) -> None:
    fixed, labels = torch.randn(5000, 16).bfloat16(), torch.randint(0, 5000, (TOKENS,))

    def by(score):
        def log_probs(hidden, weight=fixed):
            return score(hidden, weight.to(hidden.dtype), labels).log_probs.to(hidden.dtype)

        return log_probs

    inputs = [torch.randn(TOKENS, 16)] + ([fixed.float()] if is_trained else [])
    require_close(by(token_log_probs), by(token_log_probs_reference), *inputs)


def test_a_quantised_layer(has_bf16: bool) -> None:
    nf4 = nf4_quantize(torch.randn(64, 64).bfloat16())
    exact = nf4_dequantize(nf4, torch.float64)
    require_close(Nf4Linear(nf4), lambda x: x @ exact.T, torch.randn(TOKENS, 64))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="flags of x86 processors")
def test_a_cpu_that_emulates_bf16_is_recognised(monkeypatch) -> None:
    """AVX-512 alone is not enough, and oneDNN may have been kept from the instructions that are there."""
    probe = dispatch.has_bf16_products.__wrapped__
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for has_avx512_bf16, has_amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_avx512_bf16: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        assert probe() == (has_avx512_bf16 or has_amx)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    assert not probe()
