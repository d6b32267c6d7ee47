"""FP8 and four-bit folders open in stock transformers and say what the model says, as far as their bits allow."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fettle.export.calibration import curvatures_by_layer
from fettle.export.compressed import dense, in_fp8
from fettle.models.decoder import causal_lm_class
from fettle.models.load import load_model, load_tokenizer
from fettle.models.save import save_model


@pytest.fixture(scope="module")
def wide_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for groups of 128, but for one matrix."""
    tokenizer = load_tokenizer(small_model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
    )  # fmt: skip
    to = tmp_path_factory.mktemp("wide") / "model"
    save_model(causal_lm_class("llama")(config).to(torch.bfloat16), tokenizer, to)
    return to


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None]).logits[0].float()


@pytest.mark.parametrize(("layout", "bound"), [("fp8", 0.06), ("w4a16", 0.25)])
def test_stock_transformers_opens_it(cli, wide_model, chats, tmp_path, layout, bound) -> None:
    ended = cli(
        "export", "--model", wide_model, "--format", layout, "--data", chats, "--to", tmp_path / "out"
    )
    assert ended.code == 0, ended.err
    assert "loss on held-out rows" in ended.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected, compressed = logits(load_model(wide_model)), logits(found)
    assert 1e-4 < float((compressed - expected).norm() / expected.norm()) < bound
    if layout == "w4a16":
        assert "down_proj is not quantized: its 192 inputs are not a multiple of 128" in ended.out
        assert "model.layers.0.mlp.down_proj" in config["ignore"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_of_zeros_stays_zero_in_fp8(dtype) -> None:
    weight = torch.randn(4, 16, dtype=dtype)
    weight[1] = 0
    stored = in_fp8(weight)
    assert (dense(stored)[1] == 0).all() and dense(stored).isfinite().all()
    assert (stored["weight_scale"] > 0).all()


def test_fp8_without_rows_is_the_same_folder(cli, wide_model, chats, tmp_path) -> None:
    words = ("export", "--model", wide_model, "--format", "fp8", "--to")
    assert cli(*words, tmp_path / "a").code == cli(*words, tmp_path / "b", "--data", chats).code == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_a_model_whose_loss_is_no_number_is_refused(cli, wide_model, chats, tmp_path, form) -> None:
    model = load_model(wide_model)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    save_model(model, load_tokenizer(wide_model), tmp_path / "base")
    words = ("export", "--model", tmp_path / "base", "--format", form, "--to", tmp_path / "out")
    ended = cli(*words, "--data", chats)
    assert ended.code == 2 and "its loss on rows of --data is nan" in ended.err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_layers_of_one_input_share_its_curvature(wide_model) -> None:
    model = load_model(wide_model, dtype="float32")
    rows = [torch.arange(3, 40)[None], torch.arange(20, 50)[None]]
    first, second = curvatures_by_layer(model, rows)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for curvatures in (first, second):
        assert curvatures["self_attn.q_proj"] is curvatures["self_attn.v_proj"]
        assert curvatures["mlp.gate_proj"] is curvatures["mlp.up_proj"] is not curvatures["mlp.down_proj"]
    found = {}
    for name, linear in (("self_attn.k_proj", attention.k_proj), ("mlp.down_proj", mlp.down_proj)):
        linear.register_forward_pre_hook(lambda _, x, name=name: found.setdefault(name, []).append(x[0][0]))
    for row in rows:
        model(input_ids=row, use_cache=False)
    for name, inputs in found.items():
        torch.testing.assert_close(second[name], sum(x.T @ x for x in inputs), rtol=1e-4, atol=1e-4)


def test_rows_that_cannot_be_read_are_found_before_the_model_is_loaded(cli, tmp_path) -> None:
    words = ("export", "--model", "no/model", "--format", "w4a16", "--to", tmp_path / "out")
    ended = cli(*words, "--data", tmp_path / "absent.jsonl")
    assert ended.code == 2 and "absent.jsonl" in ended.err


def test_a_model_too_narrow_for_four_bits_is_refused(cli, small_model, chats, tmp_path) -> None:
    words = ("export", "--model", small_model, "--format", "w4a16", "--to", tmp_path / "out")
    ended = cli(*words, "--data", chats)
    assert ended.code == 2 and "w4a16 quantizes inputs in groups of 128" in ended.err
    assert not (tmp_path / "out").exists()


def test_four_bits_need_rows(cli, wide_model, tmp_path) -> None:
    ended = cli("export", "--model", wide_model, "--format", "w4a16", "--to", tmp_path / "out")
    assert ended.code == 2 and "needs calibration rows: add --data (about 100 rows)" in ended.err
    assert not (tmp_path / "out").exists()
