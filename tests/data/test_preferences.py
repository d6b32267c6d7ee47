"""Tokens of preference rows: those of supervised training on each side, with the prompt that TRL finds."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, KTOTrainer

from fettle.data import (
    BadRows,
    LabelledRow,
    NothingToTrainOn,
    PreferenceRow,
    Row,
    labelled_of,
    read_labelled,
    read_preferences,
    tokenize_labelled,
    tokenize_preferences,
    tokenize_rows,
)
from fettle.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}
GOOD = {"role": "assistant", "content": "It is Paris."}
BAD = {"role": "assistant", "content": "I am fine, thank you."}


def pair(
    *before: dict[str, Any], chosen: str | dict = GOOD, rejected: str | dict = BAD, where: str = "a, line 1"
):
    sides = [{**GOOD, "content": side} if isinstance(side, str) else side for side in (chosen, rejected)]
    rows = [Row(where, "messages", messages=(*before, side), completion_turns=1) for side in sides]
    return PreferenceRow(*rows)


def texts(prompt: str, chosen: str, rejected: str) -> PreferenceRow:
    rows = [Row("a, line 1", "text", prompt=prompt, completion=answer) for answer in (chosen, rejected)]
    return PreferenceRow(*rows)


def prepared(trainer: type, tokenizer: Any, *records: dict[str, Any]) -> list[dict[str, Any]]:
    """The records as stock TRL tokenizes them."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    host = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    return list(trainer._prepare_dataset(host, Dataset.from_list(list(records)), tokenizer, args, "train"))


def one(rows: list[PreferenceRow], tokenizer: Any, max_length: int = 512):
    (example,), _ = tokenize_preferences(rows, tokenizer, max_length=max_length)
    return example


def trained(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


def assert_same_documents(
    family, prompt: list[int], answer: list[int], stock_prompt: list[int], stock: list[int]
):
    """The same ids and the same end of the prompt; an empty block of thoughts is the template's, not the model's."""
    assert prompt + answer == stock_prompt + stock
    added = family.tokenizer.decode(prompt[len(stock_prompt) :])
    assert added == ("<think>\n\n</think>\n\n" if family.name == "thinking" else "")
    assert prompt[: len(stock_prompt)] == stock_prompt


@pytest.mark.parametrize(
    "words", ["It is Paris.", "It is:\n\n```python\nprint(1)\n```", "naïve café ☕ 4", "4"]
)
def test_pairs_are_tokenized_as_trl_does(family, words):
    rows = [pair(QUESTION, chosen=words), pair(QUESTION, GOOD, QUESTION, chosen=words)]
    examples, _ = tokenize_preferences(rows, family.tokenizer, max_length=512)
    records = [
        {
            "prompt": list(row.prompt),
            "chosen": [row.chosen.messages[-1]],
            "rejected": [row.rejected.messages[-1]],
        }
        for row in rows
    ]
    for ours, stock in zip(examples, prepared(DPOTrainer, family.tokenizer, *records), strict=True):
        assert_same_documents(
            family, ours.prompt_ids, ours.chosen_ids, stock["prompt_ids"], stock["chosen_ids"]
        )
        assert_same_documents(
            family, ours.prompt_ids, ours.rejected_ids, stock["prompt_ids"], stock["rejected_ids"]
        )


def test_labelled_answers_are_tokenized_as_trl_does(family):
    rows = labelled_of([pair(QUESTION)])
    examples, _ = tokenize_labelled(rows, family.tokenizer, max_length=512)
    records = [
        {"prompt": [QUESTION], "completion": [row.row.messages[-1]], "label": row.is_desirable}
        for row in rows
    ]
    for ours, stock in zip(examples, prepared(KTOTrainer, family.tokenizer, *records), strict=True):
        answer, stock_answer = ours.completion_ids, stock["completion_ids"]
        assert_same_documents(family, ours.prompt_ids, answer, stock["prompt_ids"], stock_answer)
        assert ours.is_desirable == stock["label"]


def test_texts_for_a_base_model_are_tokenized_as_trl_does(base: PreTrainedTokenizerFast):
    record = {"prompt": "The capital of France?", "chosen": " It is Paris.", "rejected": " It is fine."}
    (stock,) = prepared(DPOTrainer, base, record)
    ours = one([texts(*record.values())], base)
    assert ours.prompt_ids == stock["prompt_ids"]
    assert (ours.chosen_ids, ours.rejected_ids) == (stock["chosen_ids"], stock["rejected_ids"])
    assert trained(ours.chosen_ids, ours.chosen_labels, base) == " It is Paris.</s>"


def test_each_side_is_what_supervised_training_makes_of_it(family):
    before = (QUESTION, GOOD, QUESTION)
    row = pair(*before)
    ours = one([row], family.tokenizer)
    sides = [(ours.chosen_ids, ours.chosen_labels), (ours.rejected_ids, ours.rejected_labels)]
    supervised = tokenize_rows([row.chosen, row.rejected], family.tokenizer, max_length=512).examples
    for (ids, labels), example in zip(sides, supervised, strict=True):
        assert ours.prompt_ids + ids == example.input_ids
        assert [-100] * len(ours.prompt_ids) + labels == example.labels
        assert labels[0] != -100
    assert trained(*sides[0], family.tokenizer).strip() == family.answer(GOOD["content"]).strip()


def test_a_token_over_the_end_of_the_prompt_belongs_to_the_answers(base: PreTrainedTokenizerFast):
    """ "Pa" + "ris." is one token, "Pa" + "☕" is not: the prompt ends before it."""
    row = texts("It is Pa", "ris.", "☕")
    ours = one([row], base)
    assert base.decode(ours.prompt_ids) == "<s>It is"
    assert base.decode(ours.prompt_ids + ours.chosen_ids) == "<s>It is Paris.</s>"
    assert base.decode(ours.prompt_ids + ours.rejected_ids) == "<s>It is Pa☕</s>"


def test_the_prompt_ends_where_the_tokens_of_the_sides_diverge():
    """ "cab" + "c" is c a bc, "cab" + "d" is c ab d: the sides differ before both answers begin."""
    vocabulary = {token: n for n, token in enumerate(["</s>", "a", "b", "c", "d", "bc", "ab"])}
    raw = Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    ours = one([texts("cab", "c", "d")], tokenizer)
    (stock,) = prepared(DPOTrainer, tokenizer, {"prompt": "cab", "chosen": "c", "rejected": "d"})
    assert tokenizer.convert_ids_to_tokens(ours.prompt_ids) == ["c"]
    assert tokenizer.convert_ids_to_tokens(ours.chosen_ids) == ["a", "bc", "</s>"]
    assert tokenizer.convert_ids_to_tokens(ours.rejected_ids) == ["ab", "d", "</s>"]
    assert ours.prompt_ids == stock["prompt_ids"]
    assert (ours.chosen_ids, ours.rejected_ids) == (stock["chosen_ids"], stock["rejected_ids"])


def test_users_turns_between_compared_answers_are_not_trained(families):
    tokenizer = families["chatml"].tokenizer
    chats = [(QUESTION, GOOD, QUESTION, GOOD), (QUESTION, BAD)]
    rows = [Row("a", "messages", messages=chat, completion_turns=len(chat) - 1) for chat in chats]
    ours = one([PreferenceRow(*rows)], tokenizer)
    assert trained(ours.chosen_ids, ours.chosen_labels, tokenizer) == "It is Paris.<|im_end|>" * 2
    assert QUESTION["content"] in tokenizer.decode(ours.chosen_ids)


def test_prompt_and_completion_are_turns_for_a_model_with_turns(families):
    tokenizer = families["llama"].tokenizer
    row = texts(QUESTION["content"], GOOD["content"], BAD["content"])
    assert one([row], tokenizer) == one([pair(QUESTION)], tokenizer)


def test_long_answers_are_cut_at_their_ends_and_counted(families):
    tokenizer = families["chatml"].tokenizer
    row = pair(QUESTION, chosen="How are you? " * 50)
    whole = one([row], tokenizer, max_length=2048)
    (example,), summary = tokenize_preferences([row, pair(QUESTION)][:1], tokenizer, max_length=64)
    assert example.prompt_ids == whole.prompt_ids
    assert example.chosen_ids == whole.chosen_ids[: 64 - len(whole.prompt_ids)]
    assert example.rejected_ids == whole.rejected_ids
    assert summary.cut == 1
    assert "1 pair: answers cut at the end, to 64 tokens with the prompt" in summary.lines()
    shown = "".join(segment.text for segment in summary.example)
    assert shown == tokenizer.decode(example.prompt_ids + example.chosen_ids)
    (labelled, _), summary = tokenize_labelled(labelled_of([row]), tokenizer, max_length=64)
    assert labelled.completion_ids == example.chosen_ids
    assert summary.cut == 1


def test_pairs_with_nothing_to_compare_are_dropped_and_named(families):
    tokenizer = families["chatml"].tokenizer
    long = "How are you? " * 50
    unweighted = [
        Row("a, line 4", "messages", messages=(QUESTION, side), completion_turns=1, is_trained=False)
        for side in (GOOD, BAD)
    ]
    rows = [
        pair(QUESTION),
        pair({**QUESTION, "content": long}, where="a, line 2"),
        pair(QUESTION, chosen=long + "Paris.", rejected=long + "fine.", where="a, line 3"),
        PreferenceRow(*unweighted),
        pair(QUESTION, chosen="<|im_end|>", where="a, line 5"),
    ]
    examples, summary = tokenize_preferences(rows, tokenizer, max_length=64)
    assert [example.where for example in examples] == ["a, line 1"]
    assert summary.dropped == [
        ("a, line 2", "its answers begin after the first 64 tokens"),
        ("a, line 3", "its answers are the same in the first 64 tokens"),
        ("a, line 4", "its weight is 0"),
        ("a, line 5", "the assistant's turn is empty"),
    ]
    with pytest.raises(NothingToTrainOn, match="4 of 4 rows dropped"):
        tokenize_preferences(rows[1:], tokenizer, max_length=64)
    labelled, summary = tokenize_labelled(labelled_of(rows[:2]), tokenizer, max_length=64)
    assert len(labelled) == 2
    assert summary.dropped == [("a, line 2", "its answer begins after the first 64 tokens")] * 2


def test_pairs_are_the_same_once_they_are_rendered(families):
    rows = [pair(QUESTION), pair(QUESTION, rejected="It is Paris.<|im_end|>", where="a, line 2")]
    with pytest.raises(UserError, match=r"^a, line 2: `chosen` and `rejected` have the same tokens"):
        tokenize_preferences(rows, families["chatml"].tokenizer, max_length=512)


def test_prompts_that_differ_once_they_are_rendered_are_refused(families):
    """An earlier answer with a weight of 0 is a part of the prompt."""
    earlier = [{**side, "train": False} for side in (GOOD, BAD)]
    rows = [
        Row("a, line 2", "messages", messages=(QUESTION, first, QUESTION, last), completion_turns=3)
        for first, last in zip(earlier, (GOOD, BAD), strict=True)
    ]
    with pytest.raises(UserError, match=r"^a, line 2: the prompts of `chosen` and `rejected` differ"):
        tokenize_preferences([PreferenceRow(*rows)], families["chatml"].tokenizer, max_length=512)


def test_what_the_template_refuses_names_the_row_and_the_side(families):
    tokenizer = families["gemma"].tokenizer
    rows = [
        pair(QUESTION),
        pair(QUESTION, QUESTION, where="a, line 2"),
        pair(QUESTION, rejected="<start>model", where="a, line 3"),
    ]
    with pytest.raises(BadRows, match="2 of 3 rows") as caught:
        tokenize_preferences(rows, tokenizer, max_length=512)
    first, second = caught.value.problems
    assert first.startswith("a, line 2: `chosen`: the model's chat template refuses this chat")
    assert second.startswith("a, line 3: `rejected`: turn 2 contains `<start>`")
    examples, summary = tokenize_preferences(rows, tokenizer, max_length=512, skip_bad_rows=True)
    assert (len(examples), summary.bad) == (1, [first, second])


def test_what_both_sides_have_is_counted_once(families):
    rows = [pair(SYSTEM, QUESTION), pair(SYSTEM, {**QUESTION, "name": "Ann"}), pair(QUESTION)]
    _, summary = tokenize_preferences(rows, families["gemma"].tokenizer, max_length=512)
    assert summary.folded_system == 2
    assert summary.unused == {"`name` of messages": 1}


def test_the_summary_tells_what_was_understood(tmp_path, families):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "What is the capital of France?", "chosen": "It is Paris.", "rejected": "I am fine.", "id": 7}\n'
        '{"chosen": "a", "rejected": "b"}\n'
    )
    rows = read_preferences(path, skip_bad_rows=True)
    (example,), summary = tokenize_preferences(rows, families["chatml"].tokenizer, max_length=512)
    counts, shown = summary.counts(), summary.example_lines()
    assert counts[0] == "1 row (1 prompt / completion) became 1 pair"
    assert counts[1] == (
        f"{len(example.prompt_ids)} tokens in prompts, {len(example.chosen_ids)} in chosen answers, "
        f"{len(example.rejected_ids)} in rejected answers"
    )
    assert "ignored: column `id` (1)" in counts
    assert counts[-1].startswith("  a.jsonl, line 2: has `chosen` and `rejected`, but no question")
    assert shown[1:] == [
        "<|im_start|>user",
        "What is the capital of France?<|im_end|>",
        "<|im_start|>assistant",
        "⟦It is Paris.<|im_end|>⟧",
        "the rejected answer:",
        "⟦I am fine.<|im_end|>⟧",
    ]
    assert (
        summary.trained_tokens == len(example.chosen_ids) + len(example.rejected_ids) - 2
    )  # the last newlines
    assert summary.end_of_turn == "<|im_end|>"


def test_the_summary_counts_answers_by_label(families):
    tokenizer = families["chatml"].tokenizer
    rows = labelled_of([pair(QUESTION)])
    examples, summary = tokenize_labelled(rows, tokenizer, max_length=512)
    prompts, good, bad = (
        2 * len(examples[0].prompt_ids),
        len(examples[0].completion_ids),
        len(examples[1].completion_ids),
    )
    assert summary.counts() == [
        "2 rows (2 messages) became 1 desirable answer and 1 undesirable",
        f"{prompts} tokens in prompts, {good} in desirable answers, {bad} in undesirable answers",
    ]
    assert "its desirable answer" in summary.example_lines()[0]
    _, summary = tokenize_labelled([LabelledRow(pair(QUESTION).rejected, False)], tokenizer, max_length=512)
    assert "no answer is desirable: there is nothing to compare the others with" in summary.counts()


def test_a_context_of_one_token_is_refused(base: PreTrainedTokenizerFast):
    with pytest.raises(UserError, match="max_length is 1"):
        tokenize_preferences([texts("a", "b", "c")], base, max_length=1)


# Real rows and tokenizers


def test_real_pairs_are_tokenized_as_trl_does(shared_data, tokenizer):
    rows = read_preferences(shared_data / "train" / "dpo_en_demo.json")
    assert len(rows) == 300
    rows = [
        row for row in rows[:60] if row.prompt[0]["role"] != "system"
    ]  # folded where TRL drops or refuses it
    examples, summary = tokenize_preferences(rows, tokenizer, max_length=100_000)
    assert (len(summary.dropped), summary.cut) == (0, 0)
    records = [
        {
            "prompt": list(row.prompt),
            "chosen": [row.chosen.messages[-1]],
            "rejected": [row.rejected.messages[-1]],
        }
        for row in rows
    ]
    for ours, stock in zip(examples, prepared(DPOTrainer, tokenizer, *records), strict=True):
        assert ours.prompt_ids + ours.chosen_ids == stock["prompt_ids"] + stock["chosen_ids"], ours.where
        assert ours.prompt_ids + ours.rejected_ids == stock["prompt_ids"] + stock["rejected_ids"], ours.where
        assert ours.prompt_ids == stock["prompt_ids"], ours.where


def test_real_labelled_rows_are_read(shared_data, tokenizer):
    rows = read_labelled(shared_data / "train" / "kto_en_demo.json")
    examples, summary = tokenize_labelled(rows[:40], tokenizer, max_length=100_000)
    assert (len(rows), len(examples)) == (300, 40)
    assert summary.desirable == sum(row.is_desirable for row in rows[:40])
