"""`fettle export --format gguf` and adapter-gguf, from the command line to llama.cpp."""

import ctypes
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, quants
from peft import LoraConfig, get_peft_model

from fettle.adapters.model_ref import resolve
from fettle.engine.llama_cpp.context import SMALLEST_CONTEXT, Context
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.llama_cpp.library import library
from fettle.engine.load import load
from fettle.errors import UserError
from fettle.export.gguf import export_adapter_gguf, export_gguf, proof, verify, write_gguf
from fettle.export.gguf.importance import read_importance
from fettle.export.gguf.metadata import GGUF_FAMILIES
from fettle.export.merge import load_merged, merge
from fettle.models.load import load_model, load_tokenizer
from fettle.models.quantized import save_nf4
from fettle.models.save import save_model
from fettle.quantization.layers import is_quantized, quantize_linears

IDS = [(7 * n * n + 31 * n) % 200 + 5 for n in range(20)]


def to_gguf(model: Path, to: Path | str) -> tuple[object, ...]:
    """The words of the command."""
    return "export", "--model", model, "--format", "gguf", "--to", to


def test_a_run_becomes_files_that_say_what_it_says(cli, logits_of, trained: Path, tmp_path: Path) -> None:
    words = ("export", "--model", trained, "--format", "gguf", "--to", tmp_path / "m.gguf")
    ended = cli(*words, "--quantization", "f16", "Q8_0", "--verify", "--ollama")
    assert ended.code == 0, ended.err
    files = [tmp_path / "m-f16.gguf", tmp_path / "m-q8_0.gguf"]
    assert ended.out.splitlines()[-2:] == [str(file) for file in files]
    assert "in llama.cpp" in ended.out and "16 of 16" in ended.out
    modelfile = (tmp_path / "m-f16.Modelfile").read_text()
    assert modelfile.startswith("FROM ./m-f16.gguf") and 'PARAMETER stop "<|end|>"' in modelfile
    model, tokenizer = load(trained, dtype="float32")
    with torch.no_grad():
        expected = merge(model, tokenizer)(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    found = logits_of(opened(files[0]), IDS)
    assert (found - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("case", [*GGUF_FAMILIES, "llama-3.2", "phi3-medium"])
@pytest.mark.parametrize("options", [{"lora_alpha": 6}, {"lora_alpha": 3, "use_rslora": True}], ids=str)
def test_an_adapter_alone_does_in_llama_cpp_what_it_does_here(
    case, options, model_of, tokenizer, logits_of, tmp_path
) -> None:
    model = model_of(case)
    save_model(model, tokenizer, tmp_path / "base")
    write_gguf(model.state_dict().items(), model.config, tokenizer, {"f32": tmp_path / "base.gguf"})
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(load_model(tmp_path / "base"), config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    file = export_adapter_gguf(tmp_path / "adapter", tmp_path / "a.gguf")
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    bare = logits_of(opened(tmp_path / "base.gguf"), IDS)
    found = logits_of(with_adapter(tmp_path / "base.gguf", file), IDS)
    assert (bare - expected).norm() > 0.1 * expected.norm()
    assert (found - expected).norm() < 2e-3 * expected.norm()


def opened(path: Path) -> Context:
    """The file opened in llama.cpp."""
    return Context(GGUFFile(path), SMALLEST_CONTEXT, 1)


def with_adapter(base: Path, adapter: Path) -> Context:
    """The base opened in llama.cpp, the adapter put on it."""
    llama, context = library(), opened(base)
    llama.llama_adapter_lora_init.restype = ctypes.c_void_p
    llama.llama_adapter_lora_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lora = ctypes.c_void_p(llama.llama_adapter_lora_init(context.file.handles.model, str(adapter).encode()))
    assert lora
    address, scale = ctypes.c_void_p(context.address), ctypes.c_float(1)
    assert (
        llama.llama_set_adapters_lora(address, ctypes.byref(lora), ctypes.c_size_t(1), ctypes.byref(scale))
        == 0
    )
    return context


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantization", "q4_k_n"], "did you mean q4_k_"),
        (["--to", "model.bin"], "ends in .gguf"),
        (["--to", "model.GGUF"], "ends in .gguf"),
        (["--to", ""], "ends in .gguf"),
        (["--to", "there.gguf"], "already exists: choose another file, or pass --overwrite"),
        (["--to", "there.gguf", "--format", "adapter-gguf"], "already exists"),
        (["--importance-matrix", "there.gguf"], "not a readable importance matrix"),
        (["--dtype", "float16"], "--dtype requires --format safetensors or nf4, but --format is gguf"),
        (["--format", "safetensors", "--verify"], "--verify requires --format gguf"),
        (["--format", "adapter-gguf"], "is not an adapter"),
    ],
)
def test_what_cannot_be_is_refused(cli, small_model, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("mine")
    ended = cli(*to_gguf(small_model, "new.gguf"), *words)
    assert ended.code == 2 and message in ended.err
    assert (tmp_path / "there.gguf").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("taken", ["m.gguf", "m.Modelfile"])
def test_a_folder_in_the_files_place_is_found_before_the_work(cli, small_model, tmp_path, taken) -> None:
    (tmp_path / taken).mkdir()
    ended = cli(*to_gguf(small_model, tmp_path / "m.gguf"), "--ollama", "--overwrite")
    assert ended.code == 2 and f"{taken} is a folder" in ended.err
    assert [entry.name for entry in tmp_path.iterdir()] == [taken]


def test_an_interrupted_export_leaves_no_file(small_model: Path, tmp_path: Path, monkeypatch) -> None:
    from fettle.export.gguf import write

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(small_model, tmp_path / "m.gguf", quantizations=["f16"])
    assert list(tmp_path.iterdir()) == []


def test_matrices_too_narrow_for_a_quantization_are_told(cli, small_model, tmp_path) -> None:
    ended = cli(*to_gguf(small_model, tmp_path / "m.gguf"), "--quantization", "q4_k_m", "q8_0")
    assert ended.code == 0 and "matrices use a larger type, as blocks of 256" in ended.out
    assert "q8_0: " not in ended.out


def test_an_adapter_alone_is_no_model_to_run(cli, trained, tmp_path) -> None:
    export_adapter_gguf(trained, file := tmp_path / "adapter.gguf")
    ended = cli("generate", "--model", file, "--prompt", "Hi")
    assert ended.code == 2 and "is a LoRA adapter without its base model" in ended.err


def test_a_window_that_llama_cpp_ignores_is_told(cli, small_model, tmp_path) -> None:
    folder = shutil.copytree(small_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 100}))
    words = ("export", "--format", "gguf", "--quantization", "f16", "--to", tmp_path / "m.gguf", "--model")
    assert "sliding window: results differ beyond 100 tokens" in cli(*words, folder).out
    assert "sliding window" not in cli(*words, small_model, "--overwrite").out


@pytest.mark.parametrize(
    ("kind", "kl", "code"), [("f16", 0.5, 1), ("q4_k_m", 0.5, 0), ("q4_k_m", float("nan"), 1)]
)
def test_a_file_that_says_other_things_fails_the_proof(
    cli, small_model, tmp_path, monkeypatch, kind, kl, code
) -> None:
    monkeypatch.setattr(proof, "verify", lambda *each: replace(verify(*each), kl=kl))
    words = ("export", "--model", small_model, "--format", "gguf", "--to", tmp_path / "m.gguf", "--verify")
    ended = cli(*words, "--quantization", kind)
    assert ended.code == code and (tmp_path / "m.gguf").exists()
    assert ("m.gguf does not match the model" in ended.err) is (code == 1)


def test_a_file_without_the_chat_template_fails_the_proof(cli, small_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fettle.export.gguf.tokenizer._template", lambda *given: None)
    words = ("export", "--model", small_model, "--format", "gguf", "--to", tmp_path / "m.gguf", "--verify")
    ended = cli(*words, "--quantization", "f16")
    assert ended.code == 1 and "m.gguf has no chat template, but the model has one" in ended.err


def test_an_activation_that_llama_cpp_does_not_compute_is_refused(cli, small_model, tmp_path) -> None:
    shutil.copytree(small_model, folder := tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    ended = cli("export", "--model", folder, "--format", "gguf", "--to", tmp_path / "m.gguf")
    assert ended.code == 2 and "this config.json asks for gelu" in ended.err
    assert not (tmp_path / "m.gguf").exists()


def write_importance(file: Path, entries: dict[str, tuple[np.ndarray, float]]) -> None:
    """As llama-imatrix does; entries: the sums of a tensor's squared inputs, and how many there were."""
    writer = GGUFWriter(file, "imatrix")
    for name, (sums, count) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums[None])
        writer.add_tensor(f"{name}.counts", np.array([[count]], dtype=np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        (
            "blk.0.ffn_down.weight",
            7,
            "7 values for blk.0.ffn_down.weight, but this model has 64 columns",
        ),
        (
            "blk.9.ffn_down.weight",
            64,
            "64 values for blk.9.ffn_down.weight, but this model has no such tensor",
        ),
    ],
)
def test_another_models_importance_matrix_is_refused(
    cli, small_model, tmp_path, name, columns, message
) -> None:
    write_importance(tmp_path / "i.gguf", {name: (np.ones(columns, dtype=np.float32), 1.0)})
    words = ("export", "--model", small_model, "--format", "gguf", "--to", tmp_path / "m.gguf")
    ended = cli(*words, "--importance-matrix", tmp_path / "i.gguf")
    assert ended.code == 2 and message in ended.err
    assert not (tmp_path / "m.gguf").exists()


def test_importances_that_are_no_numbers_are_refused(small_model, tmp_path) -> None:
    sums = np.ones(64, dtype=np.float32)
    sums[5] = np.nan
    write_importance(tmp_path / "i.gguf", {"blk.0.ffn_down.weight": (sums, 1.0)})
    with pytest.raises(UserError, match=r"values for blk\.0\.ffn_down\.weight contain NaN or Inf"):
        export_gguf(small_model, tmp_path / "m.gguf", importance=tmp_path / "i.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_an_importance_matrix_is_heeded(small_model: Path, tmp_path: Path) -> None:
    """Read as llama-imatrix writes it, and passed on to the quantiser."""
    export_gguf(small_model, tmp_path / "plain.gguf", quantizations=["q4_0"])
    tensors = {each.name: each for each in GGUFReader(tmp_path / "plain.gguf").tensors}
    name = "blk.0.ffn_down.weight"
    columns = int(tensors[name].shape[0])
    sums = np.linspace(1, 100, columns, dtype=np.float32)
    write_importance(
        tmp_path / "importance.gguf", {name: (sums, 4.0), "blk.1.ffn_down.weight": (0 * sums, 0.0)}
    )
    found = read_importance(
        tmp_path / "importance.gguf", {f"blk.{n}.ffn_down.weight": (1, columns) for n in (0, 1)}
    )
    assert np.allclose(found[name], sums / 4) and (found["blk.1.ffn_down.weight"] == 1).all()
    export_gguf(
        small_model,
        tmp_path / "weighed.gguf",
        quantizations=["q4_0"],
        importance=tmp_path / "importance.gguf",
    )
    weighed = {each.name: each for each in GGUFReader(tmp_path / "weighed.gguf").tensors}
    plain, other = (quants.dequantize(each[name].data, each[name].tensor_type) for each in (tensors, weighed))
    assert not np.array_equal(plain, other)


def test_a_checkpoint_in_nf4_is_proved(cli, small_model: Path, tmp_path: Path) -> None:
    """Its codes unpack to the type they were made of, and the proof is in fp32."""
    model = load_model(small_model, dtype="bfloat16", quantization="nf4")
    save_nf4(model, load_tokenizer(small_model), tmp_path / "nf4")
    words = (
        "export",
        "--model",
        tmp_path / "nf4",
        "--format",
        "gguf",
        "--to",
        tmp_path / "m.gguf",
        "--verify",
    )
    ended = cli(*words, "--quantization", "bf16")
    assert ended.code == 0, ended.err


def test_nf4_says_what_the_merged_model_in_nf4_says(cli, trained: Path, tmp_path: Path) -> None:
    ended = cli("export", "--model", trained, "--format", "nf4", "--to", tmp_path / "nf4")
    assert ended.code == 0, ended.err
    model, _ = load(tmp_path / "nf4", device="cpu")
    assert is_quantized(model)
    merged, _ = load_merged(resolve(trained), device="cpu")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        dense = merged(input_ids=ids, use_cache=False).logits
        quantize_linears(merged)
        expected, found = (each(input_ids=ids, use_cache=False).logits for each in (merged, model))
    assert torch.equal(found, expected)
    assert 0 < (found - dense).norm() < 0.5 * dense.norm()
