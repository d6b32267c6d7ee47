"""The embedded model's tokenizer: exact round trips, Phi-3's template, whole words, a folder that stands alone."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fettle.models.save import save_tokenizer
from fettle.tiny.lessons import lessons
from fettle.tiny.tokenizer import train_tokenizer

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Spell dog."},
    {"role": "assistant", "content": "d-o-g"},
    {"role": "user", "content": "And cat?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    rows = lessons(10_000, seed=0, split="train")
    return train_tokenizer((turn["content"] for row in rows for turn in row["messages"]), vocab_size=1280)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "the dog",
        "  two  spaces\n\n\tand tabs ",
        'héllo "wörld" {a: 12}',
        "日本語 🙂",
        "a\r\nb",
        "\x00\x7f",
    ],
)
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_is_one_token_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    (dog,) = tokenizer.encode("dog")
    for text in ("the dog runs", '"dog"', "{dog}", "dog, dog."):
        assert dog in tokenizer.encode(text)


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1280")) == ["1", "2", "8", "0"]


def test_a_role_token_takes_the_line_break_after_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False, add_generation_prompt=True)
    last_turn = "<|end|> <|user|> And Ġ cat ? <|end|> <|assistant|>".split()
    assert tokenizer.convert_ids_to_tokens(ids)[-len(last_turn) :] == last_turn
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:3], [{"role": "system", "content": ""}, *CHAT[1:]]])
def test_template_renders_as_the_one_of_phi(
    tokenizer: PreTrainedTokenizerFast, chat, with_prompt: bool, shared_data: Path
) -> None:
    real = AutoTokenizer.from_pretrained(shared_data / "checkpoints" / "Phi-3.5-mini-instruct")
    options = {"tokenize": False, "add_generation_prompt": with_prompt}
    assert tokenizer.apply_chat_template(chat, **options) == real.apply_chat_template(chat, **options)


def test_saved_folder_tokenises_alone_and_beside_a_phi_config(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, tmp_path)
    expected = tokenizer.apply_chat_template(CHAT, return_dict=False)
    for config in (None, '{"model_type": "phi3"}'):
        if config:
            (tmp_path / "config.json").write_text(config)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.apply_chat_template(CHAT, return_dict=False) == expected
        assert loaded.padding_side == "left" and loaded.model_max_length == tokenizer.model_max_length


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 200"):
        train_tokenizer(["a"], vocab_size=200)
