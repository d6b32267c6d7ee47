"""Rows that are written in a chat template already, say what not to train on, or have reasoning."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fettle.data import (
    BadRows,
    Example,
    NothingToTrainOn,
    Row,
    Rows,
    Tokenized,
    read_rows,
    render,
    tokenize_rows,
)
from fettle.data.rows import Reading
from fettle.evaluation import questions

QUESTION = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "It is Paris."}
WRONG = {"role": "assistant", "content": "It is 4.", "train": False}
WHERE = "chats.jsonl, line 1"


def chat(*messages: dict[str, Any], **fields: Any) -> Row:
    return Row(WHERE, "messages", messages=messages, **fields)


def pair(prompt: str, completion: str) -> Row:
    return Row(WHERE, "prompt / completion", prompt=prompt, completion=completion)


def tokenized(tokenizer, *rows: Row, **options: Any) -> Tokenized:
    return tokenize_rows(rows, tokenizer, max_length=512, **options)


def one(tokenizer, row: Row, **options: Any) -> Example:
    (example,) = tokenized(tokenizer, row, **options).examples
    return example


def trained_text(tokenizer, example: Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != -100])


# Weights


def test_an_answer_of_weight_0_is_read_and_not_trained_on(family):
    row = chat(QUESTION, WRONG, QUESTION, ANSWER)
    example = one(family.tokenizer, row)
    plain = one(family.tokenizer, chat(QUESTION, {**WRONG, "train": True}, QUESTION, ANSWER))
    assert example.input_ids == plain.input_ids
    assert trained_text(family.tokenizer, example).strip() == family.answer("It is Paris.").strip()
    assert "1 answer with weight 0, not trained on" in tokenized(family.tokenizer, row).summary.counts()


def test_a_weight_of_0_holds_where_all_tokens_are_trained(family):
    row = chat(QUESTION, WRONG, QUESTION, ANSWER)
    segments = render(family.tokenizer, row.messages, train_on="all")
    (left_out,) = [segment.text for segment in segments if not segment.is_trained]
    assert left_out == family.answer("It is 4.")


def test_a_row_without_a_trained_answer_is_dropped_and_says_why(families):
    rows = [chat(QUESTION, WRONG), chat(QUESTION, ANSWER, is_trained=False), chat(QUESTION, ANSWER)]
    summary = tokenized(families["phi"].tokenizer, *rows).summary
    assert [reason for _, reason in summary.dropped] == ["the weight of every answer is 0", "its weight is 0"]


def test_the_weight_of_a_question_has_no_effect_and_is_named(families):
    tokenizer = families["phi"].tokenizer
    row = chat({**QUESTION, "train": True}, ANSWER)
    assert trained_text(tokenizer, one(tokenizer, row)) == "It is Paris.<|end|>"
    assert any("`weight` or `train` of turns" in line for line in tokenized(tokenizer, row).summary.counts())


def test_a_wrong_answer_is_not_asked_for(families):
    assert questions([chat(QUESTION, WRONG)], families["phi"].tokenizer) == []


# Reasoning, and other fields of a message

THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content and (loop.last or keep) %}"
    "{{ '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking is defined %}"
    "{{ '<|im_start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|im_end|>' }}{% endif %}"
    "{{ '<|im_start|>assistant<|channel|>final<|message|>' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def like(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed: PreTrainedTokenizerFast = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
    )
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("template", "taught"),
    [
        (THINKS, "<think>\nIn Europe.\n</think>\n\nIt is Paris.<|im_end|>"),
        (THINKS.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"), None),
        (
            CHANNELS,
            "<|channel|>analysis<|message|>In Europe.<|im_end|><|im_start|>assistant<|channel|>final<|message|>"
            "It is Paris.<|im_end|>",
        ),
    ],
    ids=["think", "think in the prompt", "channels"],
)
def test_reasoning_is_trained_from_where_the_prompt_ends(families, field, template, taught):
    tokenizer = like(families["chatml"].tokenizer, template)
    segments = render(tokenizer, tokenized_messages(tokenizer, {**ANSWER, field: "In Europe."}))
    (words,) = [segment.text for segment in segments if segment.is_trained]
    assert words == (taught or "In Europe.\n</think>\n\nIt is Paris.<|im_end|>")
    name = "thinking" if template == CHANNELS else "reasoning_content"
    stock = tokenizer.apply_chat_template([QUESTION, {**ANSWER, name: "In Europe."}], tokenize=False)
    assert "".join(segment.text for segment in segments) == stock


def tokenized_messages(tokenizer, answer: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    from fettle.data.fit import fit

    return fit(chat(QUESTION, answer), tokenizer, uses_turns=True).messages


def test_reasoning_that_the_template_leaves_out_of_earlier_answers_is_named(families):
    tokenizer = like(families["chatml"].tokenizer, THINKS)
    thoughtful = {**ANSWER, "reasoning_content": "In Europe."}
    example = one(tokenizer, chat(QUESTION, thoughtful, QUESTION, thoughtful))
    assert trained_text(tokenizer, example).count("In Europe.") == 1
    summary = tokenized(tokenizer, chat(QUESTION, thoughtful, QUESTION, ANSWER)).summary
    assert "ignored: `reasoning_content` of messages (1)" in summary.counts()


def test_reasoning_that_the_template_does_not_write_is_refused(families):
    row = chat(QUESTION, {**ANSWER, "reasoning": "In Europe."})
    with pytest.raises(
        BadRows, match=r"turn 2 has `reasoning`, which the model's chat template does not render"
    ):
        tokenized(families["phi"].tokenizer, row)


def test_other_fields_are_written_by_the_template_or_named(families):
    tokenizer = families["chatml"].tokenizer
    row = chat({**QUESTION, "name": "Ann", "mood": "curious"}, ANSWER)
    (line,) = [line for line in tokenized(tokenizer, row).summary.counts() if "ignored" in line]
    assert line == "ignored: `name` of messages (1), `mood` of messages (1)"
    names = like(tokenizer, tokenizer.chat_template.replace("m['role'] +", "m['role'] + (m.name or '') +"))
    assert names.decode(one(names, row).input_ids).startswith("<|im_start|>userAnn\n")
    assert "ignored: `mood` of messages (1)" in tokenized(names, row).summary.counts()


# Rendered already


@pytest.mark.parametrize("after", ["", "\n", " \n"])
def test_an_end_token_in_the_answer_is_not_written_twice(family, after):
    plain = one(family.tokenizer, chat(QUESTION, ANSWER))
    for end in {family.end, family.tokenizer.eos_token}:
        row = chat(QUESTION, {**ANSWER, "content": f"It is Paris.{end}{after}"})
        assert one(family.tokenizer, row) == plain
        (question,) = questions([row], family.tokenizer)
        assert question.expected == "It is Paris."


def test_a_rendered_prompt_is_taken_as_it_is(family):
    tokenizer = family.tokenizer
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    plain = one(tokenizer, chat(QUESTION, ANSWER))
    for completion in ("It is Paris.", f"It is Paris.{family.end}", f"It is Paris.{family.end}\n"):
        row = pair(prompt, completion)
        example = one(tokenizer, row)
        assert example.input_ids[:2].count(tokenizer.bos_token_id) == plain.input_ids[:2].count(
            tokenizer.bos_token_id
        )
        rendered = tokenizer.decode(example.input_ids).removesuffix(family.end).rstrip()
        assert tokenizer.decode(plain.input_ids).startswith(rendered) or family.name == "thinking"
        assert trained_text(tokenizer, example).strip() == f"It is Paris.{family.end}"
        (question,) = questions([row], tokenizer)
        assert (question.text, question.expected.strip(), question.is_rendered) == (
            prompt,
            "It is Paris.",
            True,
        )


def test_a_rendered_prompt_gets_the_templates_beginning(families):
    tokenizer = families["gemma"].tokenizer
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<s>")
    assert one(tokenizer, pair(prompt.removeprefix("<s>"), "Paris")) == one(tokenizer, pair(prompt, "Paris"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            chat({**QUESTION, "content": "<|user|>\nHi<|end|>\n<|assistant|>\n"}, ANSWER),
            r"turn 1 contains .*<\|user\|>",
        ),
        (
            chat(QUESTION, {**ANSWER, "content": "It<|end|>\n<|user|>\nHi"}),
            r"turn 2 contains `<\|end\|>` and",
        ),
        (
            pair("<|user|>\nHi<|end|>\n", "It is Paris."),
            r"but not `<\|assistant\|>`, which starts an answer",
        ),
    ],
)
def test_words_with_role_tags_are_not_templated_again(families, row, message):
    with pytest.raises(BadRows, match=message):
        tokenized(families["phi"].tokenizer, row)


def test_struck_out_text_is_no_end_token(families):
    tokenizer = families["mistral"].tokenizer
    row = chat(QUESTION, {**ANSWER, "content": "It is <s>Lyon</s>"})
    assert "<s>Lyon</s></s>" in "".join(segment.text for segment in render(tokenizer, row.messages))
    assert one(tokenizer, row).input_ids == tokenizer.apply_chat_template(
        list(row.messages), return_dict=False
    )


@pytest.mark.parametrize(
    "text", ["<s>Hello there!", "\n<s>Hello there!", "<s>Hello there!</s>", "Hello there!</s>\n"]
)
def test_a_text_has_one_beginning_and_one_end(base, text):
    ids = one(base, Row("a.txt", "text", text=text)).input_ids
    assert [ids.count(base.bos_token_id), ids.count(base.eos_token_id)] == [1, 1]
    assert ids[0] == base.bos_token_id
    prompt = one(base, pair(text.removesuffix("</s>\n").removesuffix("</s>"), " I am fine."))
    assert prompt.input_ids[:2].count(base.bos_token_id) == 1


# Rows that cannot be used


def test_all_rows_that_the_template_refuses_are_listed(families):
    rows = [
        Row(f"a.jsonl, line {number}", "messages", messages=messages)
        for number, messages in enumerate(
            [(ANSWER, QUESTION, ANSWER), (QUESTION, ANSWER), (QUESTION,) * 2], start=1
        )
    ]
    rows[2] = Row("a.jsonl, line 3", "messages", messages=(QUESTION, QUESTION, ANSWER))
    tokenizer = families["gemma"].tokenizer
    with pytest.raises(BadRows, match=r"(?s)2 of 3 rows.*line 1: .*alternate.*line 3: .*alternate"):
        tokenized(tokenizer, *rows)
    read = Rows(rows, Reading(bad=["a.jsonl, line 9: is no row."]))
    left = tokenize_rows(read, tokenizer, max_length=512, skip_bad_rows=True)
    assert [example.where for example in left.examples] == ["a.jsonl, line 2"]
    assert "3 bad rows skipped:" in left.summary.counts()
    assert "  a.jsonl, line 9: is no row." in left.summary.counts()
    with pytest.raises(NothingToTrainOn, match="2 bad rows skipped"):
        tokenized(tokenizer, rows[0], rows[2], skip_bad_rows=True)


def test_columns_without_effect_are_in_the_summary(tmp_path, families):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hello!", "source": "web"}))
    rows = read_rows(tmp_path / "a.jsonl")
    counts = tokenize_rows(rows, families["phi"].tokenizer, max_length=512).summary.counts()
    assert "ignored: column `source` (1)" in counts
