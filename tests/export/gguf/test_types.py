"""The mixtures are llama.cpp's, and the bytes are ggml's."""

import ctypes

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants

from fettle.engine.llama_cpp.library import library
from fettle.export.gguf.ggml import quantize
from fettle.export.gguf.types import QUANTIZATIONS, Position, quantization_of, tensor_type

K_QUANTS = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_XS)


@pytest.mark.parametrize("kind", K_QUANTS)
@pytest.mark.parametrize("has_importance", [False, True])
def test_bytes_are_those_of_one_call_to_ggml(kind, has_importance):
    """Many chunks on many threads, from bf16, against one call on the whole matrix."""
    torch.manual_seed(0)
    weight = torch.randn(4100 if not has_importance else 300, 512).bfloat16()
    importance = np.linspace(0.1, 3, 512, dtype=np.float32) if has_importance else None
    whole, packed = weight.float().numpy(), quantize(weight, kind, importance)
    expected = np.zeros_like(packed)
    written = library().ggml_quantize_chunk(
        int(kind),
        whole.ctypes.data_as(ctypes.c_void_p),
        expected.ctypes.data_as(ctypes.c_void_p),
        0,
        *whole.shape,
        None if importance is None else importance.ctypes.data,
    )
    assert written == packed.nbytes
    assert (packed == expected).all()


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0])
def test_bytes_are_those_of_the_gguf_package(kind):
    weight = torch.randn(64, 96)
    assert (quantize(weight, kind) == quants.quantize(weight.numpy(), kind)).mean() > 0.999


def test_importance_lessens_the_error_where_it_counts():
    weight, importance = torch.randn(200, 256), np.ones(256, dtype=np.float32)
    importance[:32] = 100.0
    plain, weighed = (
        quants.dequantize(quantize(weight, Type.Q4_K, given), Type.Q4_K) - weight.numpy()
        for given in (None, importance)
    )
    assert np.square(weighed[:, :32]).mean() < np.square(plain[:, :32]).mean()


def place(layer=0, layers=32, group=1, **options):
    return Position(layer=layer, layers=layers, queries_per_key=group, **options)


# Worked out by hand from the rules of llama.cpp's llama-quant.cpp, for models of 32 layers; not its tool's output.
MIXTURES = [
    ("q4_k_m", "blk.0.attn_v.weight", place(0), Type.Q6_K),
    ("q4_k_m", "blk.4.attn_v.weight", place(4), Type.Q4_K),
    ("q4_k_m", "blk.6.ffn_down.weight", place(6), Type.Q6_K),
    ("q4_k_m", "blk.28.ffn_down.weight", place(28), Type.Q6_K),
    ("q4_k_m", "blk.5.attn_qkv.weight", place(5), Type.Q4_K),
    ("q4_k_m", "output.weight", place(), Type.Q6_K),
    ("q4_k_m", "token_embd.weight", place(), Type.Q4_K),
    ("q4_k_m", "blk.0.ffn_up.weight", place(), Type.Q4_K),
    ("q4_k_s", "blk.3.attn_v.weight", place(3), Type.Q5_K),
    ("q4_k_s", "blk.4.ffn_down.weight", place(4), Type.Q4_K),
    ("q2_k", "blk.9.attn_v.weight", place(9, group=4), Type.Q4_K),
    ("q2_k", "blk.9.attn_v.weight", place(9), Type.Q3_K),
    ("q2_k", "blk.9.attn_output.weight", place(9), Type.Q3_K),
    ("q3_k_m", "blk.1.attn_v.weight", place(1), Type.Q5_K),
    ("q3_k_m", "blk.2.ffn_down.weight", place(2), Type.Q4_K),
    ("q3_k_l", "blk.9.ffn_down.weight", place(9), Type.Q5_K),
    ("q5_k_m", "blk.31.attn_v.weight", place(31), Type.Q6_K),
    ("iq4_xs", "blk.0.ffn_down.weight", place(), Type.Q5_K),
    ("iq4_xs", "blk.0.ffn_down.weight", place(has_importance=True), Type.IQ4_XS),
    ("q4_0", "output.weight", place(), Type.Q6_K),
    ("q4_0", "blk.0.ffn_down.weight", place(has_importance=True), Type.Q4_1),
    ("q8_0", "output.weight", place(), Type.Q8_0),
    ("f16", "blk.0.attn_norm.weight", place(), Type.F32),
]


@pytest.mark.parametrize(("quantization", "name", "where", "expected"), MIXTURES)
def test_a_mixture_is_llama_cpps(quantization, name, where, expected):
    shape = (512,) if "norm" in name else (512, 512)
    assert tensor_type(name, shape, quantization_of(quantization), where, is_tied=False) is expected


def test_a_tied_embedding_is_the_output_head():
    kind = tensor_type("token_embd.weight", (512, 512), quantization_of("Q4_K_M"), place(), is_tied=True)
    assert kind is Type.Q6_K


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [("q4_k_s", Type.Q5_0), ("q5_k_s", Type.Q5_1), ("q6_k", Type.Q8_0), ("q3_k_s", Type.Q4_0)],
)
def test_a_narrow_matrix_gets_blocks_of_32(quantization, expected):
    name, mixture = "blk.9.attn_q.weight", quantization_of(quantization)
    assert tensor_type(name, (64, 96), mixture, place(9), is_tied=False) is expected
    assert tensor_type(name, (64, 33), mixture, place(9), is_tied=False) is Type.F16


def test_every_quantization_has_a_type_for_every_matrix():
    for mixture in QUANTIZATIONS.values():
        assert tensor_type("blk.0.attn_q.weight", (64, 256), mixture, place(), is_tied=False) is mixture.usual
