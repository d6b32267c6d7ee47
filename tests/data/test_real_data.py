"""Six real tokenizers and templates, and rows that people really train on."""

from itertools import chain, islice
from pathlib import Path

import pytest

from fettle.data import end_of_turn, generation_prompt, read_rows, tokenize_rows
from fettle.errors import UserError

CHATS = ["alpaca_en_demo.json", "sharegpt_dummy_conversation.json", "identity.json"]
SYSTEM = {"role": "system", "content": "Answer in one sentence."}


@pytest.mark.parametrize("name", CHATS)
def test_the_trained_part_is_the_assistants_words_and_the_end_token(shared_data, tokenizer, end, name):
    rows = read_rows(shared_data / "train" / name)[:50]
    tokenized = tokenize_rows(rows, tokenizer, max_length=8192)
    assert len(tokenized.examples) == len(rows)
    assert tokenized.summary.cut == tokenized.summary.folded_system == 0
    assert end_of_turn(tokenizer) == tokenized.summary.end_of_turn == end
    for row, example in zip(rows, tokenized.examples, strict=True):
        assert example.input_ids == tokenizer.apply_chat_template(list(row.messages), return_dict=False)
        trained = tokenizer.decode([label for label in example.labels if label != -100])
        words = [turn["content"].strip() for turn in row.messages if turn["role"] == "assistant"]
        assert [part.strip() for part in trained.split(end)] == [*words, ""], row.where


def test_the_prompt_in_use_is_what_came_before_the_answer_in_training(shared_data, tokenizer):
    rows = read_rows(shared_data / "train" / "identity.json")  # half of it in Chinese, without spaces
    for row, example in zip(rows, tokenize_rows(rows, tokenizer, max_length=512).examples, strict=True):
        prompt = tokenizer(generation_prompt(tokenizer, row.messages[:1]), add_special_tokens=False)[
            "input_ids"
        ]
        is_trained = [label != -100 for label in example.labels]
        assert example.input_ids[: is_trained.index(True)] == prompt, row.where


@pytest.mark.parametrize("name", ["c4_demo.jsonl", "wiki_demo.txt"])
def test_text_is_read_whole(shared_data, tokenizer, name):
    rows = read_rows(shared_data / "train" / name)[:20]
    rows = [type(row)(row.where, row.format, text=(row.text or "")[:50_000]) for row in rows]
    tokenized = tokenize_rows(rows, tokenizer, max_length=512)
    examples = iter(tokenized.examples)
    for row in rows:
        ids = [*tokenizer(row.text)["input_ids"], tokenizer.eos_token_id]
        windows = islice(examples, -(-len(ids) // 512))
        assert list(chain.from_iterable(example.input_ids for example in windows)) == ids
    assert next(examples, None) is None
    assert tokenized.summary.trained_tokens == tokenized.summary.tokens - len(tokenized.examples)


def test_a_system_turn_is_kept_by_every_template(shared_data, tokenizer, end):
    (row,) = read_rows(shared_data / "train" / "identity.json")[:1]
    row = type(row)(row.where, row.format, messages=(SYSTEM, *row.messages))
    tokenized = tokenize_rows([row], tokenizer, max_length=512)
    (example,) = tokenized.examples
    assert SYSTEM["content"] in tokenizer.decode(example.input_ids)
    trained = tokenizer.decode([label for label in example.labels if label != -100])
    assert trained.strip() == row.messages[-1]["content"] + end
    has_no_place = Path(tokenizer.name_or_path).name.startswith(("gemma", "Mistral"))
    assert tokenized.summary.folded_system == has_no_place


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpo_en_demo.json", "row 1: has `chosen` and `rejected`, which is preference data"),
        ("kto_en_demo.json", "row 1: has a true/false `label`, which is preference data"),
        ("sherlock_holmes_1661-8.txt", "line 1141: byte 0xe9 is not UTF-8"),
    ],
)
def test_data_that_would_be_trained_wrongly_is_refused(shared_data, name, message):
    with pytest.raises(UserError, match=message):
        read_rows(shared_data / "train" / name)
