"""Which form of its weights `generate` and `chat` run."""

import psutil
import pytest

from fettle.cli.open_engine import open_engine
from fettle.engine.load import load
from fettle.engine.text import Engine
from fettle.models.quantized import save_nf4
from fettle.quantization.layers import is_quantized, quantize_linears


@pytest.fixture
def nf4_model(small_model, tmp_path):
    model, tokenizer = load(small_model, dtype="float32", device="cpu")
    quantize_linears(model)
    save_nf4(model, tokenizer, tmp_path / "nf4")
    return tmp_path / "nf4"


def test_nf4_on_a_cpu_is_dequantized_if_the_memory_allows(nf4_model, monkeypatch):
    options = {"model": str(nf4_model), "dtype": "float32", "device": "cpu"}
    wanted = Engine(*load(nf4_model, dtype="float32", device="cpu")).generate(["Say 3.", "Say 4."])
    roomy = open_engine(options)
    assert not is_quantized(roomy.model)
    free = psutil.virtual_memory()._replace(available=1000)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: free)
        patch.setattr("fettle.engine.torch_engine._free_memory", lambda device: 2**30)
        tight = open_engine(options)
    assert is_quantized(tight.model)
    assert roomy.generate(["Say 3.", "Say 4."]) == tight.generate(["Say 3.", "Say 4."]) == wanted
