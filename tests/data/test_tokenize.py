"""Tokens and labels: equal to the stock chat template's, and trained exactly where the assistant speaks."""

from itertools import chain

import pytest
from transformers import PreTrainedTokenizerFast

from fettle.data import Example, NothingToTrainOn, Row, Tokenized, read_rows, tokenize_rows
from fettle.data.summary import Summary
from fettle.errors import UserError

QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "It is Paris."}


def chat(*messages: dict[str, str], where: str = "chats.jsonl, line 1", **fields) -> Row:
    return Row(where, "messages", messages=messages, **fields)


def trained_text(tokenizer, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != -100])


def one(tokenized: Tokenized) -> Example:
    assert len(tokenized.examples) == 1
    return tokenized.examples[0]


@pytest.mark.parametrize(
    "words", ["It is Paris.", "  It is\n\n  Paris. \n", "naïve café ☕ 4", "```python\nprint(1)\n```"]
)
def test_tokens_are_the_templates_and_labels_the_assistants(family, words):
    turns = (QUESTION, {**ANSWER, "content": words}, QUESTION, ANSWER)
    example = one(tokenize_rows([chat(*turns)], family.tokenizer, max_length=512))
    assert example.input_ids == family.tokenizer.apply_chat_template(list(turns), return_dict=False)
    gap = " " if family.name == "llama2" else ""
    first, second = trained_text(family.tokenizer, example).split(gap + family.end)[:2]
    # A template may trim the words, and the white space before them may be one token with the template's.
    assert first.lstrip() in (words.lstrip(), words.strip())
    assert second.strip() == "It is Paris."
    assert trained_text(family.tokenizer, example).endswith(family.end)


def test_labels_are_the_ids_where_trained(family):
    example = one(tokenize_rows([chat(QUESTION, ANSWER)], family.tokenizer, max_length=512))
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert example.labels[0] == -100
    assert 0 < example.trained_tokens < len(example.input_ids)


def test_a_token_that_begins_in_the_space_before_the_answer_is_trained(families):
    """Mistral: "[/INST] is" has the space and the word in one token, "[/INST] 4" has a token for each."""
    tokenizer = families["mistral"].tokenizer
    for words, first in (("is Paris.", "▁is"), ("4", "▁")):
        example = one(
            tokenize_rows([chat(QUESTION, {**ANSWER, "content": words})], tokenizer, max_length=512)
        )
        trained = [label for label in example.labels if label != -100]
        assert tokenizer.convert_ids_to_tokens(trained)[0] == first
        assert tokenizer.decode(trained).strip() == f"{words}</s>"


def test_white_space_trimmed_from_offsets_is_not_taken_for_the_answer(families):
    """With trimmed offsets the newline before an answer is a token of no width at its first letter."""
    from tokenizers import processors

    tokenizer = families["chatml"].tokenizer
    before = one(tokenize_rows([chat(QUESTION, ANSWER)], tokenizer, max_length=512))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    after = one(tokenize_rows([chat(QUESTION, ANSWER)], tokenizer, max_length=512))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert trained_text(tokenizer, after) == "It is Paris.<|im_end|>"
    assert after == before


def test_all_trains_every_token_but_the_first(family):
    example = one(tokenize_rows([chat(QUESTION, ANSWER)], family.tokenizer, max_length=512, train_on="all"))
    assert example.labels == [-100, *example.input_ids[1:]]


def test_a_long_chat_is_cut_at_the_end_and_counted(families):
    tokenizer = families["chatml"].tokenizer
    long_answer = {**ANSWER, "content": "How are you? " * 50}
    tokenized = tokenize_rows([chat(QUESTION, long_answer)], tokenizer, max_length=64)
    full = tokenizer.apply_chat_template([QUESTION, long_answer], return_dict=False)
    assert one(tokenized).input_ids == full[:64]
    assert tokenized.summary.cut == 1
    assert any("1 row truncated to 64 tokens" in line for line in tokenized.summary.lines())


def test_rows_with_nothing_to_train_on_are_dropped_and_named(families):
    long_question = {**QUESTION, "content": "How are you? " * 50}
    rows = [
        chat(QUESTION, ANSWER, where="a.jsonl, line 1"),
        chat(long_question, ANSWER, where="a.jsonl, line 2"),
        chat(QUESTION, {**ANSWER, "content": " \n"}, where="a.jsonl, line 3"),
    ]
    tokenized = tokenize_rows(rows, families["chatml"].tokenizer, max_length=64)
    assert [example.where for example in tokenized.examples] == ["a.jsonl, line 1"]
    assert tokenized.summary.dropped == [
        ("a.jsonl, line 2", "its answer begins after the first 64 tokens"),
        ("a.jsonl, line 3", "the assistant's turn is empty"),
    ]
    assert "  a.jsonl, line 3: the assistant's turn is empty" in tokenized.summary.lines()


def test_all_rows_dropped_is_an_error_with_counts_and_reasons(families):
    rows = [chat(QUESTION, {**ANSWER, "content": ""}), chat(QUESTION, ANSWER)]
    with pytest.raises(
        NothingToTrainOn, match=r"2 of 2 rows dropped, 1 because .*is empty; 1 because its answer"
    ):
        tokenize_rows(rows, families["chatml"].tokenizer, max_length=4)
    with pytest.raises(NothingToTrainOn, match="there are no rows"):
        tokenize_rows([], families["chatml"].tokenizer, max_length=4)


def test_a_refused_chat_names_its_row(families):
    rows = [chat(QUESTION, ANSWER), chat(QUESTION, QUESTION, ANSWER, where="a.jsonl, line 7")]
    with pytest.raises(UserError, match=r"^a.jsonl, line 7: .*roles must alternate"):
        tokenize_rows(rows, families["gemma"].tokenizer, max_length=512)


def test_system_turns_folded_are_counted(families):
    rows = [chat({"role": "system", "content": "Be brief."}, QUESTION, ANSWER), chat(QUESTION, ANSWER)]
    assert tokenize_rows(rows, families["gemma"].tokenizer, max_length=512).summary.folded_system == 1
    assert tokenize_rows(rows, families["phi"].tokenizer, max_length=512).summary.folded_system == 0


def test_prompt_and_completion_are_turns_for_a_model_with_turns(families):
    tokenizer = families["llama"].tokenizer
    row = Row(
        "a.csv, line 2", "prompt / completion", prompt=QUESTION["content"], completion=ANSWER["content"]
    )
    assert tokenize_rows([row], tokenizer, max_length=512).examples == [
        Example(e.input_ids, e.labels, row.where)
        for e in tokenize_rows([chat(QUESTION, ANSWER)], tokenizer, max_length=512).examples
    ]


def test_prompt_and_completion_are_plain_text_for_a_base_model(base: PreTrainedTokenizerFast):
    row = Row(
        "a.csv, line 2", "prompt / completion", prompt="The capital of France?", completion=" It is Paris."
    )
    example = one(tokenize_rows([row], base, max_length=512))
    assert base.decode(example.input_ids) == "<s>The capital of France? It is Paris.</s>"
    assert trained_text(base, example) == " It is Paris.</s>"
    # The default template, set for the chats of the same data, does not turn such rows into turns.
    chats = tokenize_rows([chat(QUESTION, ANSWER), row], base, max_length=512).examples
    assert chats[1] == example
    assert tokenize_rows([row], base, max_length=512).examples == [example]


def test_a_token_over_the_seam_of_prompt_and_completion_is_trained(base: PreTrainedTokenizerFast):
    row = Row("a.csv, line 2", "prompt / completion", prompt="It is Pa", completion="ris.")
    assert "ris." in trained_text(base, one(tokenize_rows([row], base, max_length=512)))


def test_text_is_trained_whole_and_closed(base: PreTrainedTokenizerFast):
    example = one(tokenize_rows([Row("a.txt", "text", text="Hello there!")], base, max_length=512))
    assert base.decode(example.input_ids) == "<s>Hello there!</s>"
    assert example.labels == [-100, *example.input_ids[1:]]


@pytest.mark.parametrize("max_length", [2, 7, 16, 10_000])
def test_a_long_text_is_split_and_nothing_lost(base: PreTrainedTokenizerFast, max_length):
    text = "How are you today? I am fine, thank you. " * 20
    tokenized = tokenize_rows([Row("a.txt", "text", text=text)], base, max_length=max_length)
    pieces = [example.input_ids for example in tokenized.examples]
    assert list(chain.from_iterable(pieces)) == [*base(text)["input_ids"], base.eos_token_id]
    assert max(map(len, pieces)) <= max_length
    assert tokenized.summary.split == (len(pieces) > 1)


def test_a_last_window_of_one_token_would_teach_nothing(base: PreTrainedTokenizerFast):
    text = "How are you today? I am fine, thank you. " * 20
    length = len(base(text)["input_ids"]) + 1
    for max_length in range(3, 40):
        tokenized = tokenize_rows([Row("a.txt", "text", text=text)], base, max_length=max_length)
        assert min(example.trained_tokens for example in tokenized.examples) >= 1
        assert sum(len(example.input_ids) for example in tokenized.examples) == length


def test_the_summary_tells_what_was_understood(tmp_path, families):
    path = tmp_path / "chats.jsonl"
    path.write_text(
        '{"instruction": "What is the capital of France?", "output": "It is Paris."}\n{"text": "Hello"}\n'
    )
    tokenized = tokenize_rows(read_rows(path), families["chatml"].tokenizer, max_length=512)
    summary, lines = tokenized.summary, tokenized.summary.lines()
    assert lines[0] == "2 rows (1 Alpaca, 1 text) became 2 examples"
    assert summary.tokens == sum(len(example.input_ids) for example in tokenized.examples)
    assert summary.trained_tokens == sum(example.trained_tokens for example in tokenized.examples)
    assert summary.end_of_turn == "<|im_end|>"
    assert "⟦It is Paris.<|im_end|>⟧" in lines
    assert "<|im_start|>user" in lines


def test_the_summary_keeps_counts_and_example_apart(families):
    """Words of the example may look like anything, a mark or a count."""
    words = "1 row truncated to 64 tokens\n⟦2 rows⟧"
    rows = [chat(QUESTION, {**ANSWER, "content": words}), chat(QUESTION, {**ANSWER, "content": ""})]
    summary = tokenize_rows(rows, families["chatml"].tokenizer, max_length=512).summary
    assert summary.lines() == summary.counts() + summary.example_lines()
    assert not any("⟦" in line or "cut" in line for line in summary.counts())
    assert any("1 row dropped" in line for line in summary.counts())
    heading, *shown = summary.example_lines()
    assert heading.startswith("first example")
    assert "\n".join(shown).rstrip().endswith(f"⟦{words}<|im_end|>⟧")
    assert Summary(64).example_lines() == []


def test_the_shown_example_ends_where_it_is_cut(families):
    tokenizer = families["chatml"].tokenizer
    rows = [chat(QUESTION, {**ANSWER, "content": "How are you? " * 50})]
    tokenized = tokenize_rows(rows, tokenizer, max_length=64)
    shown = "".join(segment.text for segment in tokenized.summary.example)
    assert shown == tokenizer.decode(one(tokenized).input_ids)


def test_a_context_of_one_token_is_refused(base: PreTrainedTokenizerFast):
    with pytest.raises(UserError, match="max_length is 1"):
        tokenize_rows([Row("a.txt", "text", text="Hello")], base, max_length=1)
