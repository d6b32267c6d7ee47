"""Broken GGUF files are refused before llama.cpp, which aborts the whole program for some, opens them."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.llama_cpp.gguf_header import read_header
from fettle.errors import UserError

U32, F32 = "<I", "<f"


@pytest.fixture
def file(gguf_pair, tmp_path):
    return shutil.copy(gguf_pair.file, tmp_path / "m.gguf")


def place_of(content: bytes, name: str) -> int:
    """Where the type of an entry is."""
    key = name.encode()
    return content.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)


def test_a_sound_file_is_read(gguf_pair) -> None:
    header = read_header(gguf_pair.file)
    assert header.entries["general.architecture"] == "qwen2"
    assert header.arrays["tokenizer.ggml.tokens"] == header.tensors["token_embd.weight"][-1]


@pytest.mark.parametrize(
    ("name", "form", "value"),
    [
        ("qwen2.block_count", U32, 0),
        ("qwen2.block_count", U32, 2**32 - 1),
        ("qwen2.attention.head_count", U32, 0),
        ("qwen2.attention.head_count", U32, 2**31),
        ("qwen2.attention.head_count_kv", U32, 3),
        ("qwen2.attention.layer_norm_rms_epsilon", F32, float("nan")),
    ],
)
def test_a_figure_that_makes_no_model(file, name, form, value) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into(form, content, place_of(bytes(content), name) + 4, value)
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"m\.gguf is damaged \(.*{'heads' if value == 3 else name.split('.')[-1]}"
    ):
        GGUFFile(file)


def test_a_model_without_attention_has_no_heads(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_head_count(0)
    writer.add_tensor("blk.0.ssm_in.weight", np.zeros((16, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(tmp_path / "m.gguf").entries["mamba.attention.head_count"] == 0


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_file_cut_off(file, share) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(UserError, match="damaged"):
        GGUFFile(file)


@pytest.mark.parametrize("at", [8, 16])
def test_counts_beyond_the_file(file, at) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into("<Q", content, at, 2**60)
    file.write_bytes(content)
    with pytest.raises(UserError, match="more than fit into the file"):
        GGUFFile(file)


def written(path: Path, *add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A file of the architecture llama with these entries and tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for each in add:
        each(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("add", "fault"),
    [
        (
            (
                lambda writer: writer.add_tokenizer_model("gpt2"),
                lambda writer: writer.add_token_list(["a", "b"]),
                lambda writer: writer.add_token_types([1, 6]),
                lambda writer: writer.add_tensor("token_embd.weight", np.zeros((2, 8), np.float32)),
            ),
            "it has byte tokens",
        ),
        (
            (lambda writer: writer.add_layer_norm_rms_eps(-1.0),),
            r"layer_norm_rms_epsilon is -1\.0, expected a number of 0 or more",
        ),
        ((lambda writer: writer.add_token_list(["a", "", "b", "", "a"]),), "the token 'a' appears twice"),
    ],
    ids=["byte tokens", "epsilon", "tokens"],
)
def test_what_llama_cpp_would_abort_at(tmp_path, add, fault) -> None:
    with pytest.raises(UserError, match=rf"m\.gguf is damaged \(.*{fault}"):
        read_header(written(tmp_path / "m.gguf", *add))
