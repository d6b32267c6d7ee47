"""Official checkpoint folders, out and in.

Stock transformers opens what fettle saves with no difference at all, and the other way round; whatever is
wrong with a folder is one sentence that names the file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fettle.errors import UserError
from fettle.models.load import load_model, load_tokenizer
from fettle.models.save import save_model, save_tokenizer

PairOf = Callable[[str], Any]

OLD_SPELLINGS = ("torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor")
"""Written beside the new ones, for readers of before transformers 5."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w96 and the three special tokens of the test models."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    rules = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return logits


def stock_load(folder: Path) -> PreTrainedModel:
    # as in conftest.py: not by the fused attention, which leaves Gemma 2's soft cap out
    attention = "eager" if AutoConfig.from_pretrained(folder).model_type == "gemma2" else None
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, attn_implementation=attention
    )
    assert not any(info.values()), info
    return model


# --- out and in --------------------------------------------------------------------------------------------


def test_a_saved_folder_opens_in_stock_transformers(
    pair: Any, tokenizer: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    save_model(pair.ours, tokenizer, tmp_path)
    expected = logits_of(pair.stock, tokens)
    assert torch.equal(logits_of(stock_load(tmp_path), tokens), expected)
    assert torch.equal(logits_of(load_model(tmp_path), tokens), expected)


def test_a_stock_folder_opens_here(pair: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    pair.stock.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(logits_of(loaded, tokens), logits_of(pair.stock, tokens))
    assert not loaded.training
    assert loaded.name_or_path == str(tmp_path)


def test_both_write_the_same_tensors(pair: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The same names, shapes and values: a tied head is stored once."""
    pair.stock.save_pretrained(tmp_path / "stock")
    save_model(pair.ours, tokenizer, tmp_path / "ours")
    stock, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "ours"))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_both_write_the_same_config(pair: Any, tokenizer: Any, tmp_path: Path) -> None:
    pair.stock.save_pretrained(tmp_path / "stock")
    save_model(pair.ours, tokenizer, tmp_path / "ours")
    for file in ("config.json", "generation_config.json"):
        stock, ours = (json.loads((tmp_path / name / file).read_text()) for name in ("stock", "ours"))
        new = ({name: each[name] for name in each if name not in OLD_SPELLINGS} for each in (stock, ours))
        assert next(new) == next(new)
    read = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("stock", "ours")]
    stock, ours = (each["rope_parameters"] for each in read)
    assert stock == {name: value for name, value in ours.items() if name in stock}
    assert set(ours) - set(stock) <= {"type"} and read[0]["dtype"] == read[1]["dtype"]


def test_older_readers_find_what_they_know(pair_of: PairOf, tokenizer: Any, tmp_path: Path) -> None:
    save_model(pair_of("llama-llama3-rope").ours, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = config["rope_parameters"]
    assert config["rope_theta"] == new["rope_theta"] and config["torch_dtype"] == config["dtype"]
    assert config["rope_scaling"]["factor"] == new["factor"]
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize("variant", ["phi3-longrope", "phi3-partial-rotary"])
def test_older_readers_of_phi3_take_what_they_find(
    variant: str, pair_of: PairOf, tokenizer: Any, tmp_path: Path
) -> None:
    """Before transformers 5 a rope_scaling of other than three entries was refused."""
    save_model(pair_of(variant).ours, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = config["rope_parameters"]
    assert config.get("partial_rotary_factor", 1.0) == new.get("partial_rotary_factor", 1.0)
    if variant == "phi3-longrope":
        assert config["original_max_position_embeddings"] == new["original_max_position_embeddings"] == 16
        assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    else:
        assert config["rope_scaling"] is None and config["partial_rotary_factor"] == 0.5


def test_a_factor_that_older_readers_cannot_be_told_is_kept(
    pair_of: PairOf, tokenizer: Any, tmp_path: Path
) -> None:
    ours = pair_of("phi3-longrope").copy().ours
    ours.config.rope_parameters["attention_factor"] = 1.5
    save_model(ours, tokenizer, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["attention_factor"] == 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_dtype_is_kept(
    pair_of: PairOf, tokenizer: Any, tokens: torch.Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    stock = pair_of("phi3").copy().stock.to(dtype)
    stock.save_pretrained(tmp_path / "stock")
    ours = load_model(tmp_path / "stock")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    save_model(ours, tokenizer, tmp_path / "ours")
    assert {t.dtype for t in load_file(tmp_path / "ours" / "model.safetensors").values()} == {dtype}
    again = stock_load(tmp_path / "ours")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(logits_of(again, tokens), logits_of(stock_load(tmp_path / "stock"), tokens))
    as_fp32 = load_model(tmp_path / "ours", dtype="float32")
    assert {p.dtype for p in as_fp32.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["phi3", "gemma2-tied"])
def test_shards(pair_of: PairOf, tokens: torch.Tensor, tmp_path: Path, name: str) -> None:
    pair = pair_of(name)
    expected = logits_of(pair.stock, tokens)
    for saved, folder in ((pair.stock, tmp_path / "stock"), (pair.ours, tmp_path / "ours")):
        saved.save_pretrained(folder, max_shard_size="20kB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        assert torch.equal(logits_of(stock_load(folder), tokens), expected)
        assert torch.equal(logits_of(load_model(folder), tokens), expected)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2-tied"])
def test_tied_weights_stay_tied(pair_of: PairOf, tmp_path: Path, name: str) -> None:
    pair_of(name).stock.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_tied_checkpoint_may_hold_its_head_twice(
    pair_of: PairOf, tokens: torch.Tensor, tmp_path: Path
) -> None:
    pair = pair_of("llama-tied")
    pair.stock.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert torch.equal(logits_of(load_model(tmp_path), tokens), logits_of(pair.stock, tokens))


def test_what_a_checkpoint_says_of_remote_code_is_dropped(
    pair_of: PairOf, tokenizer: Any, tmp_path: Path
) -> None:
    """Phi-3.5's config.json names Python files to run; stock transformers would ask for them."""
    pair_of("phi3").stock.save_pretrained(tmp_path / "theirs")
    remote = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(tmp_path / "theirs", auto_map=remote)
    (tmp_path / "theirs" / "evil.py").write_text("raise SystemExit('remote code was run')\n")
    save_model(load_model(tmp_path / "theirs"), tokenizer, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "auto_map" not in saved
    assert saved["architectures"] == ["Phi3ForCausalLM"]
    assert saved["model_type"] == "phi3"
    assert not list((tmp_path / "ours").glob("*.py"))
    stock_load(tmp_path / "ours")


def test_the_generation_config_is_kept(pair_of: PairOf, tokenizer: Any, tmp_path: Path) -> None:
    """Phi-3 ends its turns with a token that config.json does not name."""
    stock = pair_of("phi3").copy().stock
    stock.generation_config.eos_token_id = [2, 32, 7]
    stock.save_pretrained(tmp_path / "stock")
    ours = load_model(tmp_path / "stock")
    assert ours.generation_config.eos_token_id == [2, 32, 7]
    save_model(ours, tokenizer, tmp_path / "ours")
    assert stock_load(tmp_path / "ours").generation_config.eos_token_id == [2, 32, 7]


def test_loading_leaves_the_folder_as_it_was(pair_of: PairOf, tmp_path: Path) -> None:
    pair_of("phi3").stock.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    load_model(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_rotary_frequencies_in_old_checkpoints_are_passed_over(
    pair_of: PairOf, tokens: torch.Tensor, tmp_path: Path
) -> None:
    pair = pair_of("llama")
    pair.stock.save_pretrained(tmp_path)
    edit_tensors(
        tmp_path, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0)}
    )
    assert torch.equal(logits_of(load_model(tmp_path), tokens), logits_of(pair.stock, tokens))


# --- tokenizers --------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_needs_nothing_beside_it(tokenizer: Any, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # known to transformers 4 as well
    text = "w5 w96 nonsense w3"
    expected = tokenizer(text)["input_ids"]
    assert expected == [5, 96, 0, 3]
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(text)["input_ids"] == expected
        assert again.eos_token_id == 2
        assert again.pad_token_id == 0


@pytest.mark.parametrize(
    "name",
    [
        "Phi-3.5-mini-instruct",
        "zephyr-7b-beta",
        "Mistral-7B-Instruct-v0.3",
        "TinyLlama-1.1B-Chat-v1.0",
        pytest.param("Llama-3.1-8B-Instruct", marks=pytest.mark.slow),
        pytest.param("gemma-2-9b-it", marks=pytest.mark.slow),
    ],
)
def test_a_real_tokenizer_saved_alone_tokenises_as_before(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    """Without the config.json beside it, `LlamaTokenizer` would rebuild Phi-3's rules in another way."""
    original = load_tokenizer(shared_data / "checkpoints" / name)
    save_tokenizer(original, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = original.apply_chat_template(
        [
            {"role": "user", "content": "hello  world\n\n x"},
            {"role": "assistant", "content": " hello\tthere"},
        ],
        tokenize=False,
    )
    for text in (chat, "hello", "  hello ", "<|user|>\nhello<|end|>\n", "naïve — 東京 🙂", "</s> hello<eos>"):
        expected = original(text)["input_ids"]
        assert again(text)["input_ids"] == expected
        assert again.decode(expected) == original.decode(expected)
    assert again.chat_template == original.chat_template
    assert again.eos_token_id == original.eos_token_id


def test_a_missing_padding_token_becomes_the_end_of_text(tokenizer: Any, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).pad_token == "</s>"


def test_an_unreadable_tokenizer_is_one_sentence(tokenizer: Any, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(UserError, match=f"{tmp_path}.*tokenizer"):
        load_tokenizer(tmp_path)


# --- faults ------------------------------------------------------------------------------------------------


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    """Set values of config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def assert_refused(folder: Path, *said: str) -> None:
    """Loading raises UserError in one sentence (or two) that contains every one of `said`."""
    with pytest.raises(UserError) as refused:
        load_model(folder)
    message = str(refused.value)
    assert "\n" not in message
    for part in (str(folder), *said):
        assert part in message, message


@pytest.fixture
def folder(pair_of: PairOf, tmp_path: Path) -> Path:
    pair_of("phi3").stock.save_pretrained(tmp_path)
    return tmp_path


def test_a_missing_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != name})
    assert_refused(folder, name, "1 of", "missing")


def test_a_missing_head_that_is_not_tied(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    assert_refused(folder, "lm_head.weight", "missing")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(folder, lambda t: t | {name: torch.zeros(32, 31)})
    assert_refused(folder, name, "(32, 31)", "(32, 32)")


def test_a_config_of_another_size(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    assert_refused(folder, "gate_up_proj", "(96, 32)", "(128, 32)")


def test_a_tensor_with_no_place(folder: Path) -> None:
    edit_tensors(folder, lambda t: t | {"model.layers.0.mlp.side_proj.weight": torch.zeros(32, 48)})
    assert_refused(folder, "model.layers.0.mlp.side_proj.weight", "phi3")


def test_an_unknown_family(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    assert_refused(folder, "config.json", "mamba", "phi3, llama")


def test_a_quantised_checkpoint(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert_refused(folder, "config.json", "quantised")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; expected a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": 33}, "(97, 33)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_act": "nonsense"}, "'nonsense'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "got nonsense"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "must have length 4, got 1",
        ),
        ({"pad_token_id": 97}, "pad_token_id is 97"),
    ],
    ids=str,
)
def test_an_invalid_config_value(folder: Path, values: dict[str, Any], said: str) -> None:
    edit_config(folder, **values)
    assert_refused(folder, said)


def test_a_rope_type_not_known_here(pair_of: PairOf, tmp_path: Path) -> None:
    pair_of("llama").stock.save_pretrained(tmp_path)
    edit_config(
        tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "alpha": 1.0}
    )
    assert_refused(tmp_path, "dynamic", "longrope")


def test_weights_of_integers(folder: Path) -> None:
    edit_tensors(folder, lambda t: {k: v.to(torch.int8) for k, v in t.items()})
    assert_refused(folder, "I8", "BF16")
