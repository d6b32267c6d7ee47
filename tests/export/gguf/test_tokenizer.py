"""llama.cpp cuts text into the tokenizer's own ids."""

import copy
import json
import unicodedata
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fettle.checkpoints.locate import embedded_model
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.errors import UserError
from fettle.export.gguf import verify, write_gguf
from fettle.export.gguf.battery import battery
from fettle.export.gguf.tokenizer import PRE_TOKENIZERS, name_for, template_begins, tokenizer_fields
from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES
from fettle.models.load import load_model, load_tokenizer

# Texts of the battery that differ, at most. Mistral's tokenizer puts a space before the first word only, and only
# where there is none; llama.cpp always, and after every special token too (in chats, the template in the file makes
# up for it). Gemma's has pieces of tabs and spaces that its merges never reach; llama.cpp does.
CHECKPOINTS = {
    "Phi-3.5-mini-instruct": 0,
    "Llama-3.1-8B-Instruct": 0,
    "TinyLlama-1.1B-Chat-v1.0": 0,
    "zephyr-7b-beta": 0,
    "gemma-2-9b-it": 22,
    "Mistral-7B-Instruct-v0.3": 110,
}
CHAT = [
    {"role": "user", "content": "Hello there,  how are you?\n"},
    {"role": "assistant", "content": "Fine, thanks!"},
    {"role": "user", "content": "Bye"},
]


def write_with_tokenizer(folder, path):
    """A model of one tiny layer under the checkpoint's tokenizer."""
    tokenizer = load_tokenizer(folder)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
    config = FAMILIES[family].config(
        **sizes,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
        **more,
    )
    model = causal_lm_class(family)(config)
    write_gguf(model.state_dict().items(), config, tokenizer, {"f16": path}, name=folder.name)
    return tokenizer, GGUFFile(path)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ids_are_the_tokenizers(name, shared_data, tmp_path):
    folder = shared_data / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip(f"needs the tokenizer of {name}, which is not here")
    tokenizer, llama = write_with_tokenizer(folder, tmp_path / "model.gguf")
    texts = battery(tokenizer.all_special_tokens)
    adds = template_begins(tokenizer)  # TinyLlama's and Zephyr's templates leave the first token out
    expected_ids = {text: tokenizer(text, add_special_tokens=adds)["input_ids"] for text in texts}
    unequal = [text for text, ids in expected_ids.items() if llama.tokenize(text, add_special=True) != ids]
    assert len(texts) > 500
    assert len(unequal) <= CHECKPOINTS[name], unequal[:5]
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    template = tokenizer_fields(tokenizer, llama.vocab_size)["chat_template"]
    chat = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    if adds:
        chat = chat.removeprefix(tokenizer.bos_token)  # as llama.cpp does
    assert llama.tokenize(chat, add_special=True) == expected


def test_the_embedded_model_is_proved_whole(tokenizer, tmp_path):
    """Ids, logits and the greedy continuation."""
    model, path = load_model(embedded_model(), dtype="float32").eval(), tmp_path / "tiny.gguf"
    files = {"f16": path, "q8_0": tmp_path / "q8.gguf"}
    write_gguf(
        model.state_dict().items(), model.config, tokenizer, files, name="fettle-tiny", stop_ids=[4, 0]
    )
    proof = verify(path, model, tokenizer)
    assert proof.texts_equal == proof.texts > 500, proof.unequal
    assert proof.kl < 1e-5
    assert proof.top_agreement > 0.98
    assert proof.continuation_equal == proof.continuation_tokens > 0
    assert verify(files["q8_0"], model, tokenizer, texts=["one"]).kl < 1e-3


def test_a_file_that_llama_cpp_cannot_open_is_named(tokenizer, model_of, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"broken\.gguf"):
        verify(path, model_of("llama"), tokenizer, texts=[])


def test_roles_and_template_are_in_the_file(tokenizer):
    fields = tokenizer_fields(tokenizer, 1300, stop_ids=[4, 0])
    assert fields["ggml.eos_token_id"] == 0
    assert fields["ggml.eot_token_id"] == 4
    assert fields["ggml.add_bos_token"] is False
    assert fields["chat_template"] == tokenizer.chat_template
    assert fields["ggml.tokens"][-1] == "[PAD1299]"
    assert fields["ggml.token_type"][4] == 3  # control


def test_the_default_of_several_templates_is_in_the_file(tokenizer):
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"tool_use": "{{ tools }}", "default": tokenizer.chat_template}
    assert tokenizer_fields(several, 1300)["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(("template", "begins"), [("{{ bos_token }}", True), ("", False), (None, True)])
def test_the_first_token_is_added_where_chats_begin_with_it(tokenizer, template, begins):
    beginning = copy.deepcopy(tokenizer)
    beginning.bos_token = tokenizer.eos_token
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    beginning.chat_template = None if template is None else template + tokenizer.chat_template
    assert tokenizer_fields(beginning, 1300)["ggml.add_bos_token"] is begins


def test_the_name_says_how_white_space_after_special_tokens_is_treated(tokenizer):
    assert name_for(tokenizer, "mine") == "mine (phi-3)"
    assert name_for(tokenizer, "Phi3-mine") == "Phi3-mine"


def test_too_many_ids_are_refused(tokenizer):
    with pytest.raises(UserError, match="beyond the model's 100 embeddings"):
        tokenizer_fields(tokenizer, 100)


def byte_level(pattern: str, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind Llama 3 and Qwen have, learnt from the battery."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=[AddedToken("<|end|>", special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(battery(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@pytest.mark.parametrize("pattern", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_ids_of_byte_level_tokenizers_are_their_own(pattern, model_of, tmp_path):
    model, path, tokenizer = model_of("qwen2"), tmp_path / "model.gguf", byte_level(pattern)
    write_gguf(model.state_dict().items(), model.config, tokenizer, {"q8_0": path})
    llama, texts = GGUFFile(path), battery(["<|end|>"])
    assert [
        text for text in texts if llama.tokenize(text, add_special=True) != tokenizer(text)["input_ids"]
    ] == []


def test_only_decomposed_text_is_cut_otherwise_where_the_tokenizer_composes_it(model_of, tmp_path):
    """Qwen's do; llama.cpp takes text as it comes."""
    tokenizer = byte_level(next(iter(PRE_TOKENIZERS)), normalizers.NFC())
    model, path = model_of("qwen2"), tmp_path / "model.gguf"
    write_gguf(model.state_dict().items(), model.config, tokenizer, {"q8_0": path})
    llama, texts = GGUFFile(path), battery(["<|end|>"])
    unequal = [t for t in texts if llama.tokenize(t, add_special=True) != tokenizer(t)["input_ids"]]
    assert 0 < len(unequal) <= 40
    assert all(unicodedata.normalize("NFC", text) != text for text in unequal)


def test_a_cut_that_llama_cpp_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"a pattern that .* does not support"):
        tokenizer_fields(byte_level(r"\s+"), 1280)
