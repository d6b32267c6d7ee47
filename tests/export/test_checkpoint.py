"""An exported folder is complete, opens in stock transformers, or is not there."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fettle.adapters.lora import adapt
from fettle.adapters.model_ref import resolve
from fettle.checkpoints.adapter_facts import AdapterFacts, write_facts
from fettle.checkpoints.fingerprint import fingerprint
from fettle.checkpoints.folder import inspect
from fettle.checkpoints.locate import EMBEDDED
from fettle.checkpoints.safetensors_header import read_places
from fettle.engine.load import load
from fettle.engine.text import stop_ids
from fettle.errors import UserError
from fettle.export import checkpoint, shards
from fettle.export.checkpoint import export_folder, export_nf4, export_safetensors
from fettle.export.compressed import FP8, in_fp8
from fettle.export.merge import load_merged
from fettle.models.load import load_model, load_tokenizer
from fettle.models.quantized import save_nf4
from fettle.models.save import save_model
from fettle.quantization.layers import plain_linears, quantize_linears

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(scope="module")
def stock_adapter(small_model, tmp_path_factory):
    """An adapter that plain PEFT made: fettle's note is not beside it, nor a tokenizer."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(small_model)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("stock") / "adapter"
    adapted.save_pretrained(folder)
    return folder, adapted.eval()


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    return model.eval()(**tokenizer("The quick brown fox", return_tensors="pt"), use_cache=False).logits


def test_an_adapter_of_plain_peft_is_merged(stock_adapter, small_model, tmp_path):
    folder, adapted = stock_adapter
    assert export_safetensors(folder, tmp_path / "out") == tmp_path / "out"
    merged, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert (logits(merged, tokenizer) - logits(adapted, tokenizer)).abs().max() < 1e-5
    assert tokenizer.get_vocab() == load_tokenizer(small_model).get_vocab()


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
}


@pytest.mark.parametrize("context", [256, None])
def test_factors_fixed_in_training_stay_fixed(small_model, tmp_path, context):
    """LongRoPE: a short text has the long factors too, where the adapter was trained with them."""
    base = shutil.copytree(small_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}
    (base / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    adapted = adapt(load_model(base), rank=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    facts = AdapterFacts(base_fingerprint=fingerprint(base), context_tokens=context)
    write_facts(tmp_path / "adapter", facts)
    export_safetensors(tmp_path / "adapter", tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, tokenizer = load(tmp_path / "adapter", device="cpu")
    assert (logits(stock, tokenizer) - logits(model, tokenizer)).abs().max() < 1e-5
    model.get_base_model().set_context(64 if context else 256)
    assert (logits(stock, tokenizer) - logits(model, tokenizer)).abs().max() > 1e-2


def test_the_folder_has_everything_a_full_model_needs(trained, small_model, tmp_path):
    export_safetensors(trained, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"] and "auto_map" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    stops = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|end|>"),
    ]  # the base's own names the first
    assert GenerationConfig.from_pretrained(small_model).eos_token_id == stops[0]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == stops


def test_a_full_model_is_copied_bit_for_bit(small_model, tmp_path):
    export_safetensors(small_model, tmp_path / "out")
    stored, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", small_model))
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)


def test_the_embedded_model_is_exported(tmp_path):
    export_safetensors("fettle-tiny", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Phi3ForCausalLM"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_is_merged_in_the_type_asked_for(trained, tmp_path, dtype):
    export_safetensors(trained, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}


@pytest.fixture(params=["full", "lora", "dora", "tied", "on nf4", "nf4"])
def any_model(request, small_model, gguf_pair, tmp_path):
    """Every way in which what is exported may lie on the disk, in bf16."""
    kind, base = request.param, tmp_path / "base"
    model = load_model(gguf_pair.folder, dtype="bfloat16")
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    tokenizer = load_tokenizer(gguf_pair.folder)
    save_model(model, tokenizer, base)
    if kind == "nf4":
        return export_nf4(base, tmp_path / "stored")
    if kind == "full":
        return base
    adapted = get_peft_model(
        load_model(base),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=kind == "dora"),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    facts = AdapterFacts(base_fingerprint=fingerprint(base), quantization="nf4" if kind == "on nf4" else None)
    write_facts(tmp_path / "adapter", facts)
    return tmp_path / "adapter"


@pytest.mark.parametrize("form", ["safetensors", "nf4", "fp8"])
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
def test_a_stream_writes_what_the_whole_model_in_memory_would(
    any_model, form, shard_bytes, tmp_path, monkeypatch
):
    """Bit by bit: PEFT's own merge, saved by transformers."""
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    full, tokenizer = load_merged(resolve(any_model), device="cpu")
    full.generation_config.eos_token_id = stop_ids(full.generation_config.eos_token_id, tokenizer)
    if form == "safetensors":
        export_safetensors(any_model, tmp_path / "out")
        save_model(full, tokenizer, tmp_path / "expected")
    elif form == "nf4":
        export_nf4(any_model, tmp_path / "out")
        quantize_linears(full)
        save_nf4(full, tokenizer, tmp_path / "expected")
    else:
        export_folder(any_model, tmp_path / "out", packing=FP8)
        linears = plain_linears(full)
        save_model(full, tokenizer, tmp_path / "expected")
        full.config.quantization_config = FP8.config(full.dtype)
        full.config.save_pretrained(tmp_path / "expected")
    inspect(tmp_path / "out")  # each tensor where the index says
    found, expected = (tensors_in(tmp_path / each) for each in ("out", "expected"))
    if form == "fp8":
        for name, linear in linears.items():
            expected |= {f"{name}.{leaf}": part for leaf, part in in_fp8(linear.weight).items()}
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        written, saved = (json.loads((tmp_path / each / file).read_text()) for each in ("out", "expected"))
        if form == "fp8" and file == "config.json":
            written = {key: written[key] for key in saved}  # without the old spellings, which save_model adds
        assert written == saved
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) is (shard_bytes < 10**6)


def tensors_in(folder):
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        read_places(file)  # whole, and without gaps
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4 to float32", "nf4"])
def test_the_disk_is_asked_for_what_is_written(small_model, tmp_path, monkeypatch, kind):
    asked = []
    monkeypatch.setattr(checkpoint, "require_free_space", lambda to, needed, what: asked.append(needed))
    monkeypatch.setattr(checkpoint, "TOKENIZER_BYTES", 0)
    name, to = small_model, tmp_path / "out"
    if kind == "nf4 to float32":
        name, kind = export_nf4(small_model, tmp_path / "nf4"), "float32"
    export_nf4(name, to) if kind == "nf4" else export_safetensors(name, to, dtype=kind)
    assert asked[-1] == pytest.approx(inspect(to).weight_bytes, rel=0.1)


def test_numbers_that_fp16_cannot_hold_are_not_written(small_model, tmp_path):
    model = load_model(small_model)
    model.model.norm.weight.data[3] = 1e6
    save_model(model, load_tokenizer(small_model), tmp_path / "base")
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond fp16's range"):
        export_safetensors(tmp_path / "base", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled(small_model, tmp_path):
    (tmp_path / "out").mkdir()
    export_safetensors(small_model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_nothing_is_left_of_an_export_that_failed(small_model, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr("fettle.export.checkpoint.save_around_weights", fail)
    with pytest.raises(OSError, match="on fire"):
        export_safetensors(small_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["safetensors", "nf4", "fp8", "w4a16"])
def test_overwrite_replaces_a_model(cli, small_model, trained, chats, tmp_path, form):
    export_safetensors(small_model, tmp_path / "out")
    name, data = (
        (EMBEDDED, ("--data", chats)) if form == "w4a16" else (trained, ())
    )  # wide enough for its groups
    words = ("export", "--model", name, "--format", form, *data, "--to", tmp_path / "out")
    assert cli(*words).code == 2
    ended = cli(*words, "--overwrite")
    assert ended.code == 0, ended.err
    fresh = tmp_path / "fresh"
    assert cli("export", "--model", name, "--format", form, *data, "--to", fresh).code == 0
    for file in fresh.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fresh", "out"]


def test_named_chat_templates_are_part_of_a_model(cli, small_model, tmp_path):
    tokenizer = load_tokenizer(small_model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    save_model(load_model(small_model), tokenizer, tmp_path / "base")
    words = ("export", "--model", tmp_path / "base", "--to", tmp_path / "out")
    assert cli(*words).code == 0
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").exists()
    ended = cli(*words, "--overwrite")
    assert ended.code == 0, ended.err


def test_what_is_exported_is_not_overwritten(small_model, trained, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")
    with pytest.raises(UserError, match="which the model is read from"):
        export_nf4(folder, folder, overwrite=True)
    with pytest.raises(UserError, match="which the model is read from"):
        export_nf4(trained, small_model, overwrite=True)  # its base
    with pytest.raises(UserError, match="which is not a model file"):
        export_nf4(small_model, trained, overwrite=True)  # a run


@pytest.mark.parametrize("to", [".", "", "../here", "..", "down/.."])
def test_the_folder_the_command_runs_in_is_not_written(cli, tmp_path, monkeypatch, to):
    (tmp_path / "here" / "down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    ended = cli("export", "--model", "no/model", "--to", to, "--overwrite")
    assert ended.code == 2 and "which contains the current directory" in ended.err


def test_a_full_folder_is_refused_before_the_model_is_looked_for(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        export_safetensors("no/model", tmp_path)
