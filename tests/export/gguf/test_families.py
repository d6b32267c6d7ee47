"""Every family's file says in llama.cpp what the model says in PyTorch."""

import pytest
import torch
from gguf import GGUFReader

from fettle.errors import UserError
from fettle.export.gguf import QUANTIZATIONS, write_gguf
from fettle.export.gguf.metadata import ignored_window

# Mean KL allowed, in nats. Measured over all cases: f32 at most 6e-7,
# f16 1.2e-6, q8_0 5.6e-4, q4_k_m 4.6e-2.
ALLOWED = {"f32": 3e-6, "f16": 1e-5, "q8_0": 1e-3, "q4_k_m": 8e-2}
IDS = [(7 * n * n + 31 * n) % 1270 + 5 for n in range(24)]


def test_llama_cpp_says_what_the_model_says(model, tokenizer, kl, tmp_path):
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ALLOWED}
    write_gguf(model.state_dict().items(), model.config, tokenizer, files)
    found = {kind: kl(model, path, IDS) for kind, path in files.items()}
    assert all(found[kind] < ALLOWED[kind] for kind in ALLOWED), found


def test_long_factors_serve_long_contexts(model_of, tokenizer, kl, tmp_path):
    model, path = model_of("phi3-longrope"), tmp_path / "model.gguf"
    write_gguf(model.state_dict().items(), model.config, tokenizer, {"f16": path})
    beyond = 25 * IDS  # 600 tokens, where the original context is 512
    assert kl(model, path, beyond) < ALLOWED["f16"]
    assert kl(model, path, IDS) < ALLOWED["f16"]
    model.set_context(1024)  # the long factors for short texts too: another model
    assert kl(model, path, IDS) > 1e-3


@pytest.mark.parametrize("quantization", sorted(set(QUANTIZATIONS) - set(ALLOWED)))
def test_every_quantization_opens(quantization, model_of, tokenizer, kl, tmp_path):
    model, path = model_of("llama"), tmp_path / "model.gguf"
    write_gguf(model.state_dict().items(), model.config, tokenizer, {quantization: path})
    assert kl(model, path, IDS) < (0.5 if quantization.startswith(("q2", "q3")) else 0.12)


def test_files_of_one_pass_are_those_of_several(model_of, tokenizer, tmp_path):
    model, kinds = model_of("qwen3"), ("bf16", "q6_k", "q3_k_m")
    together = {kind: tmp_path / f"{kind}.gguf" for kind in kinds}
    write_gguf(model.state_dict().items(), model.config, tokenizer, together)
    for kind, path in together.items():
        alone = tmp_path / "alone.gguf"
        backwards = reversed(list(model.state_dict().items()))
        write_gguf(backwards, model.config, tokenizer, {kind: alone}, overwrite=True)
        assert path.read_bytes() == alone.read_bytes()


def test_the_file_names_its_figures(model_of, tokenizer, tmp_path):
    model, path = model_of("phi3-longrope"), tmp_path / "model.gguf"
    write_gguf(model.state_dict().items(), model.config, tokenizer, {"q4_k_m": path}, name="mine")
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "phi3"
    assert fields["general.name"] == "mine (phi-3)"
    assert fields["general.file_type"] == 15
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 2 / 9) ** 0.5)
    assert fields["phi3.rope.scaling.original_context_length"] == 512


def without(name):
    return lambda tensors: ((key, tensor) for key, tensor in tensors if key != name)


def reshaped(tensors):
    return ((key, tensor.T if "down_proj" in key else tensor) for key, tensor in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), "output_norm.weight among them"),
        (reshaped, "the config implies"),
        (lambda tensors: [*tensors, ("model.visual.weight", torch.zeros(2))], "no name for it"),
        (lambda tensors: ((key, tensor * 1e9) for key, tensor in tensors), "beyond fp16's range"),
    ],
)
def test_a_faulty_model_leaves_no_file(change, message, model_of, tokenizer, tmp_path):
    model = model_of("llama")
    with pytest.raises(UserError, match=message):
        write_gguf(
            change(model.state_dict().items()), model.config, tokenizer, {"f16": tmp_path / "model.gguf"}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"q4_k_n": "a.gguf"}, "did you mean q4_k_"),
        ({"f16": "a.bin"}, "ends in .gguf"),
        ({"f16": "there.gguf"}, "already exists"),
    ],
)
def test_a_mistaken_name_is_refused(files, message, model_of, tokenizer, tmp_path):
    model = model_of("llama")
    (tmp_path / "there.gguf").write_text("mine")
    paths = {kind: tmp_path / name for kind, name in files.items()}
    with pytest.raises(UserError, match=message):
        write_gguf(model.state_dict().items(), model.config, tokenizer, paths)
    assert (tmp_path / "there.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("case", "options", "expected"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 128}, None),  # no shorter than the context
        ("phi3", {"sliding_window": 64}, 64),
        ("qwen2", {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),
        ("qwen2", {"sliding_window": 64, "layer_types": ["full_attention"] * 2}, None),
        ("gemma2", {}, None),
    ],
)
def test_a_window_that_llama_cpp_ignores_is_known(case, options, expected, model_of):
    config = model_of(case).config
    for name, value in options.items():
        setattr(config, name, value)
    assert ignored_window(config) == expected


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar = 7"),
        ("gemma2", {"num_hidden_layers": 46, "layer_types": ["sliding_attention", "full_attention"] * 23,
                    "hidden_size": 512}, "sqrt\\(128\\)"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("gemma", {"tie_word_embeddings": False}, "gemma model only with its output head tied"),
        ("gemma2", {"tie_word_embeddings": False}, "gemma2 model only with its output head tied"),
        ("gemma", {"attention_bias": True}, "attention biases"),
        ("gemma", {"hidden_act": "gelu"}, "computes gelu_pytorch_tanh in a gemma model's MLP"),
        ("qwen2-yarn", {"rope_parameters": {"attention_factor": 1.5}}, "attention_factor = 1.5"),
        ("qwen2-yarn", {"rope_parameters": {"beta_fast": 16}}, "beta_fast = 16"),
        ("qwen2-yarn", {"rope_parameters": {"truncate": False}}, "truncate = False"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_say_is_refused(case, options, message, model_of, tokenizer, tmp_path):
    model = model_of(case)
    for name, value in options.items():
        setattr(
            model.config, name, model.config.rope_parameters | value if name == "rope_parameters" else value
        )
    with pytest.raises(UserError, match=message):
        write_gguf(model.state_dict().items(), model.config, tokenizer, {"f16": tmp_path / "a.gguf"})
