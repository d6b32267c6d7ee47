"""The Triton attention kernels agree with packed_attention, and fit each generation's shared memory."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="runs the kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
outside = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
LIMITS = {75: 64, 80: 163, 90: 227}
CASES = {
    "causal": ([21], 2, 2, 32, {}),
    "packed grouped": ([5, 17, 1, 10], 4, 2, 32, {}),
    "window": ([25, 8], 2, 1, 32, {"window": 6}),
    "softcap and odd channels": ([19, 4], 2, 1, 24, {"softcap": 2.0}),
}
SHARED = {
    "several answers": [0, 18, 18],
    "packed and shared": [0, 4, 4, 0, 9],
    "with softcap": [0, 6],
    "shared within a window": [0, 4, 4],
}
"""How many tokens of its root each document continues; for the cases of the same names."""
CASES |= {
    "several answers": ([20, 25, 6], 2, 2, 32, {}),
    "packed and shared": ([5, 17, 1, 10, 9], 4, 2, 32, {}),
    "with softcap": ([19, 4], 2, 1, 24, {"softcap": 2.0}),
    "shared within a window": ([24, 20, 20], 2, 1, 32, {"window": 24}),
}


@inside
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_agree_with_packed_attention(case: str, monkeypatch, kernel_device) -> None:
    from fettle.ops.attention import Documents, packed_attention
    from fettle.ops.kernels.attention import attention_backward, attention_forward

    lengths, heads, shared, channels, rules = CASES[case]
    tokens = sum(lengths)
    torch.manual_seed(0)
    fused = torch.randn(tokens, heads + 2 * shared, channels)
    parts = fused.split([heads, shared, shared], dim=1)
    begins = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    starts = begins.repeat_interleave(torch.tensor(lengths)).int()
    is_start = torch.zeros(tokens, dtype=torch.bool).index_fill(0, begins, True)
    grad = torch.randn(tokens, heads, channels)
    exact = [part.double().requires_grad_() for part in parts]
    continued = torch.zeros(tokens, dtype=torch.long)
    continued[begins] = torch.tensor(SHARED.get(case, [0] * len(lengths)))
    documents = Documents.from_starts(is_start, continued)
    expected = packed_attention(*exact, documents, scale=0.3, **rules)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    options = (starts, documents.prefixes, 0.3, rules.get("window"), rules.get("softcap"))
    out, logsumexp = attention_forward(*parts, *options, block=16)
    grads = attention_backward(grad, *parts, out, logsumexp, *options, block=16)
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)


@outside
@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
def test_every_kernel_fits_shared_memory(capability: int, channels: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fettle.ops.kernels import attention

    block = attention.block_size(channels, 2, capability)
    padded = triton.next_power_of_2(channels)
    constants = {"GROUP": 2, "D": channels, "PADDED": padded, "SOFTCAP": 0.0, "QUERIES": block, "KEYS": block}
    half = "*fp16" if capability < 80 else "*bf16"
    types = dict.fromkeys("query key value grad out grad_query grad_key grad_value".split(), half)
    types |= dict.fromkeys(("starts", "roots", "prefix_ends", "ends"), "*i32")
    types |= {"logsumexp": "*fp32", "delta": "*fp32", "scale": "fp32"}
    for kernel in (
        attention.forward_kernel,
        attention.query_gradient_kernel,
        attention.key_value_gradient_kernel,
    ):
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        options = {"num_warps": 4, "num_stages": 1}
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.__name__, capability, channels, block, built.metadata.shared)
        assert built.metadata.shared <= LIMITS[capability] * 1024
