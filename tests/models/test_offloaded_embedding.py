"""A token table outside: the same rows, no parameter, saved and cast like one, and mapped where NF4 loads on a CPU."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from fettle.models.load import load_model
from fettle.models.offloaded_embedding import OffloadedEmbedding


def test_rows_are_those_of_the_plain_table() -> None:
    plain = torch.nn.Embedding(10, 4, padding_idx=0)
    outer = OffloadedEmbedding(plain.weight, 0)
    ids = torch.tensor([[1, 9, 0], [9, 2, 3]])
    assert torch.equal(outer(ids), plain(ids))
    assert outer(ids[:, :0]).shape == (2, 0, 4) and "10, 4" in repr(outer)
    assert not list(outer.parameters())
    assert torch.equal(outer.state_dict()["weight"], plain.weight)


def test_a_change_of_device_leaves_it_and_a_change_of_type_does_not() -> None:
    outer = OffloadedEmbedding(torch.randn(10, 4), None)
    assert outer.to("meta").weight.device.type == "cpu"
    assert outer.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16


def test_a_table_is_mapped_from_the_middle_of_a_file(tmp_path: Path) -> None:
    expected = torch.randn(5, 3).bfloat16()
    (tmp_path / "file").write_bytes(b"12345678" + expected.view(torch.uint8).numpy().tobytes())
    embedding = OffloadedEmbedding.mapped(tmp_path / "file", 8, (5, 3), torch.bfloat16, None)
    for _ in range(2):  # the second time after the first has left memory
        assert torch.equal(embedding(torch.tensor([4, 0])), expected[[4, 0]])
    assert torch.equal(embedding.weight, expected)


def test_nf4_on_a_cpu_leaves_the_table_in_its_file(small_model: Path) -> None:
    model = load_model(small_model, quantization="nf4")
    stored = load_file(small_model / "model.safetensors")["model.embed_tokens.weight"]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, OffloadedEmbedding) is not model.config.tie_word_embeddings
    assert torch.equal(embedding.weight, stored)
    wider = load_model(small_model, quantization="nf4", dtype="bfloat16")
    assert torch.equal(wider.get_input_embeddings().weight, stored.bfloat16())
