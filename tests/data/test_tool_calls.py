"""Rows with tools: every form reads alike, and the assistant's calls are trained on, not the tools or their results."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fettle.data import (
    BadRows,
    Row,
    generation_prompt,
    read_labelled,
    read_preferences,
    read_prompts,
    read_rows,
    tokenize_preferences,
    tokenize_rows,
)
from fettle.data.fit import fit
from fettle.data.inspect import inspect_data
from fettle.data.tool_layout import ToolLayout, tool_layout
from fettle.errors import UserError
from fettle.evaluation.answers import questions

FUNCTION = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "The sum of two and two?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2, "é"]}}}
CALLER = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"sum": 4}'}
ANSWER = {"role": "assistant", "content": "It is 4."}
CHAT = [USER, CALLER, RESULT, ANSWER]
TURNS = [*CHAT, {"role": "user", "content": "Thank you. And now?"}, CALLER, RESULT, ANSWER]
ARGUMENTS = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)
WRITTEN = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'

# Qwen's layout: calls next to the words, results in turns of the user.
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}{% for call in m.tool_calls %}"
    "{{ '\n' if m.content or not loop.first }}"
    '{{ \'<tool_call>\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' }}ARGS'
    "{{ '}\n</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AS_OBJECT = CHATML.replace("ARGS", "{{ call.function.arguments | tojson }}")
AS_TEXT = CHATML.replace("ARGS", "{{ call.function.arguments }}")
TRL_TEMPLATES = ["qwen2_5_training", "qwen3_training", "qwen3_instruct_2507_training"]


def trl_template(name: str) -> str:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def read_one(tmp_path: Path, record: Any) -> Row:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (row,) = read_rows(tmp_path / "a.jsonl")
    return row


def parts(tokenizer: Any, ids: list[int], is_trained: list[bool]) -> list[str]:
    """The decoded runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(ids, is_trained, strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def trained(tokenizer: Any, row: Row, **options: Any) -> list[str]:
    (example,) = tokenize_rows([row], tokenizer, max_length=4096, **options).examples
    return parts(tokenizer, example.input_ids, [label != -100 for label in example.labels])


@pytest.fixture
def chatml(families):
    """A function that returns ChatML's tokenizer with another template."""
    tokenizer = families["chatml"].tokenizer
    own = tokenizer.chat_template

    def with_template(template: str) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    yield with_template
    tokenizer.chat_template = own


SHAREGPT = [
    {"from": "human", "value": USER["content"]},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": RESULT["content"]},
    {"from": "gpt", "value": ANSWER["content"]},
]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "tools": [TOOL]},
        {"messages": CHAT, "tools": json.dumps([TOOL])},
        {"messages": CHAT, "tools": [FUNCTION]},
        {"messages": CHAT, "tools": [json.dumps(FUNCTION)]},
        {"messages": CHAT, "functions": json.dumps([FUNCTION])},
        {"messages": [USER, CALLER | {"content": None}, RESULT, ANSWER], "tools": [TOOL]},
        {
            "messages": [USER, {"role": "assistant", "tool_calls": json.dumps([CALL])}, RESULT, ANSWER],
            "tools": TOOL,
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                RESULT | {"role": "function"},
                ANSWER,
            ],
            "functions": [FUNCTION],
        },
        {"conversations": SHAREGPT, "tools": json.dumps([FUNCTION])},
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": json.dumps([CALL["function"]])},
                *SHAREGPT[2:],
            ],
            "tools": json.dumps([FUNCTION]),
        },
        {"prompt": [USER], "completion": CHAT[1:], "tools": [TOOL]},
    ],
)
def test_every_form_reads_alike(tmp_path, record):
    row = read_one(tmp_path, record)
    assert row.messages == tuple(CHAT)
    assert row.tools == (TOOL,)
    assert row.unused == ()


def test_arguments_keep_their_form_until_the_template_is_known(tmp_path, chatml):
    given = {"name": "add", "arguments": '{"a":2, "b": null}'}
    row = read_one(tmp_path, {"messages": [USER, CALLER | {"tool_calls": [given]}]})
    tokenizer = chatml(AS_OBJECT)
    (call,) = fit(row, tokenizer, True).messages[1]["tool_calls"]
    assert call["function"]["arguments"] == {"a": 2, "b": None}
    (call,) = fit(row, chatml(AS_TEXT), True).messages[1]["tool_calls"]
    assert call["function"]["arguments"] == given["arguments"]


def test_keys_that_a_table_adds_are_absent(tmp_path):
    """Parquet gives every object the keys of all."""
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": arguments}}
        for arguments in ({"a": 2}, {"b": "x"})
    ]
    records = [{"messages": [USER, CALLER | {"tool_calls": [call]}], "tools": [TOOL]} for call in calls]
    records[1]["tools"] = [
        {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert [row.messages[-1]["tool_calls"] for row in rows] == [[call] for call in calls]
    assert [list(row.tools) for row in rows] == [record["tools"] for record in records]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "add(2, 2)"}]},
            r"turn 2: `value` is not valid JSON \(Expecting value at character 1\); expected {\"name\"",
        ),
        (
            {"messages": [USER, CALLER | {"tool_calls": [{"name": "add", "arguments": '{"a": 2'}]}]},
            r"turn 2: `arguments` is not valid JSON \(.* at character 8\)",
        ),
        (
            {"messages": [USER, CALLER | {"tool_calls": [{"name": "add", "arguments": "[2]"}]}]},
            "turn 2: the `arguments` of a call are a list; expected an object",
        ),
        (
            {"messages": [USER, CALLER | {"tool_calls": [{"name": "add", "parameters": {"a": 2}}]}]},
            "turn 2: a call in `tool_calls` has field parameters; expected",
        ),
        (
            {"messages": [USER, CALLER | {"tool_calls": [{"function": {"arguments": {"a": 2}}}]}]},
            "turn 2: `tool_calls` contains field arguments but no name",
        ),
        ({"messages": [USER, CALLER | {"tool_calls": ["add"]}]}, '`tool_calls` contains "add"; expected'),
        ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, "has `tool_calls` in a turn of the user"),
        (
            {"messages": [USER, CALLER | {"function_call": CALL["function"]}]},
            "turn 2: has `tool_calls` and `function_call`; keep one of them",
        ),
        ({"messages": CHAT, "tools": "add"}, r"`tools` is not valid JSON .*; expected a list of"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "`tools` contains field type but no name"),
        (
            {"messages": CHAT, "tools": [TOOL], "functions": [FUNCTION]},
            "has `tools` and `functions`; keep one",
        ),
        ({"text": "Hello", "tools": [TOOL]}, "has `tools`, which a plain text cannot use; remove the column"),
        (
            {"messages": [USER, ANSWER], "function_call": CALL["function"]},
            "has a column `function_call`, but it is not clear which answer it belongs to",
        ),
    ],
)
def test_what_is_no_tool_or_call_is_refused_with_its_place(tmp_path, record, message):
    with pytest.raises(UserError, match=rf"^a\.jsonl, line 1.*{message}"):
        read_one(tmp_path, record)


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT])
@pytest.mark.parametrize("tools", [(), (TOOL,)])
@pytest.mark.parametrize("gives_text", [False, True])
def test_calls_and_answers_are_trained_on(chatml, template, tools, gives_text):
    tokenizer = chatml(template)
    assert tool_layout(tokenizer) == ToolLayout(tools=True, calls=True, takes_text=template is AS_TEXT)
    call = {
        "type": "function",
        "function": CALL["function"]
        | {"arguments": ARGUMENTS if gives_text else CALL["function"]["arguments"]},
    }
    turns = tuple(turn | {"tool_calls": [call]} if turn is CALLER else turn for turn in TURNS)
    row = Row("row 1", "messages", messages=turns, tools=tools)
    assert trained(tokenizer, row) == [f"{WRITTEN}<|im_end|>", "It is 4.<|im_end|>"] * 2
    (example,) = tokenize_rows([row], tokenizer, max_length=4096).examples
    fitted = fit(row, tokenizer, True)
    assert example.input_ids == tokenizer.apply_chat_template(
        list(fitted.messages), tools=list(tools) or None, return_dict=False
    )


def test_words_before_several_calls_and_an_empty_result(chatml):
    tokenizer = chatml(AS_OBJECT)
    caller = {"role": "assistant", "content": "Let me add.", "tool_calls": [CALL, CALL]}
    row = Row("row 1", "messages", messages=(USER, caller, RESULT | {"content": ""}, CALLER, RESULT, ANSWER))
    assert trained(tokenizer, row) == [
        f"Let me add.\n{WRITTEN}\n{WRITTEN}<|im_end|>",
        f"{WRITTEN}<|im_end|>",
        "It is 4.<|im_end|>",
    ]


NAMED_RESULT = (
    "{{ '<tool_response>' ~ messages[loop.index0 - 1].tool_calls[0].function.name ~ '\n' ~ m.content }}"
)


def test_a_name_that_is_written_again_before_the_result_is_not_trained_on(chatml):
    named = AS_OBJECT.replace("{% if m.role == 'tool' %}", "{% if m.role == 'tool' %}" + NAMED_RESULT)
    row = Row("row 1", "messages", messages=tuple(TURNS))
    assert trained(chatml(named), row) == [f"{WRITTEN}<|im_end|>", "It is 4.<|im_end|>"] * 2
    open_ended = named.replace(
        "{{ '<|im_end|>\n' }}{% endfor %}", "{{ '<|im_end|>\n' if not m.tool_calls }}{% endfor %}"
    )
    with pytest.raises(BadRows, match="does not end a call of a tool with the token"):
        tokenize_rows([row], chatml(open_ended), max_length=4096)


def test_weights_and_completions_cover_calls(chatml):
    tokenizer = chatml(AS_OBJECT)
    unweighted = Row("row 1", "messages", messages=(USER, CALLER | {"train": False}, RESULT, ANSWER))
    assert trained(tokenizer, unweighted) == ["It is 4.<|im_end|>"]
    assert not any("<tool_call>" in part for part in trained(tokenizer, unweighted, train_on="all"))
    completion = Row("row 1", "messages", messages=(*CHAT, USER, CALLER), completion_turns=1)
    assert trained(tokenizer, completion) == [f"{WRITTEN}<|im_end|>"]


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_masks_are_those_of_trl_s_templates(chatml, name):
    """TRL marks what the assistant writes inside its copies of these templates; it includes the line break around."""
    tokenizer = chatml(trl_template(name))
    thought = "<think>\n\n</think>\n\n" if name == "qwen3_training" else ""
    for turns in (TURNS, CHAT[:2], [USER, CALLER | {"content": "Let me add.", "tool_calls": [CALL, CALL]}]):
        row = Row("row 1", "messages", messages=tuple(turns), tools=(TOOL,))
        theirs = tokenizer.apply_chat_template(
            turns, tools=[TOOL], return_dict=True, return_assistant_tokens_mask=True
        )
        expected = parts(tokenizer, theirs["input_ids"], [bool(mask) for mask in theirs["assistant_masks"]])
        assert len(expected) == sum(turn["role"] == "assistant" for turn in turns)
        # The empty block of thoughts is the template's own, as in every answer.
        assert trained(tokenizer, row) == [part.strip("\n").removeprefix(thought) for part in expected]


@pytest.mark.parametrize("tokenizer", ["Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3"], indirect=True)
def test_real_templates_and_real_rows(shared_data, tokenizer, end):
    name = Path(tokenizer.name_or_path).name
    rows = read_rows(shared_data / "train" / "glaive_toolcall_en_demo.json")
    assert sum(bool(row.tools) for row in rows) == 191
    rows = [row for row in rows if any("tool_calls" in turn for turn in row.messages)][:40]
    tokenized = tokenize_rows(rows, tokenizer, max_length=8192)
    ids = "ids of tool calls, replaced by nine letters and digits as the chat template requires"
    assert tokenized.summary.noted == ({ids: 40} if name.startswith("Mistral") else {})
    for row, example in zip(rows, tokenized.examples, strict=True):
        fitted = fit(row, tokenizer, True)
        assert example.input_ids == tokenizer.apply_chat_template(
            list(fitted.messages), tools=list(row.tools), return_dict=False
        )
        expected = []
        for turn in fitted.messages:
            for call in turn.get("tool_calls", ()):
                function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
                written = json.dumps(function, ensure_ascii=False)
                if name.startswith("Mistral"):
                    expected.append(f'[TOOL_CALLS] [{written[:-1]}, "id": "{call["id"]}"}}]')
                else:
                    expected.append(written.replace('"arguments"', '"parameters"', 1))
            if turn["role"] == "assistant" and "tool_calls" not in turn:
                expected.append(turn["content"].strip())
        found = parts(tokenizer, example.input_ids, [label != -100 for label in example.labels])
        assert [part.removesuffix(end).strip() for part in found] == expected, row.where
        assert all(part.endswith(end) for part in found)


@pytest.mark.parametrize("given", [None, "call_0123456789abcdef"])
def test_ids_are_made_for_a_template_that_requires_them(chatml, given):
    check = "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    calls = "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}{% endfor %}"
    opening = "{% for m in messages %}"
    tokenizer = chatml(AS_OBJECT.replace(opening, opening + check + calls))
    assert tool_layout(tokenizer).needs_ids
    caller = CALLER | {"tool_calls": [CALL | ({"id": given} if given else {}), CALL]}
    result = RESULT | ({"tool_call_id": given} if given else {})
    row = Row("row 1", "messages", messages=(USER, caller, result, RESULT, ANSWER))
    _, called, *results, _ = fit(row, tokenizer, True).messages
    ids = [call["id"] for call in called["tool_calls"]]
    assert [turn["tool_call_id"] for turn in results] == ids
    assert len({*ids}) == 2 and all(len(each) == 9 and each.isalnum() for each in ids)
    assert fit(row, tokenizer, True) == fit(row, tokenizer, True)


@pytest.mark.parametrize("name", ["phi", "zephyr", "llama"])
def test_a_template_without_tools_refuses_them(families, name):
    tokenizer = families[name].tokenizer
    with pytest.raises(
        BadRows, match="row 1: has a list of tools, which the model's chat template does not write"
    ):
        tokenize_rows(
            [Row("row 1", "messages", messages=(USER, ANSWER), tools=(TOOL,))], tokenizer, max_length=99
        )
    with pytest.raises(
        BadRows, match="row 1: turn 2 calls a tool, which the model's chat template does not write"
    ):
        tokenize_rows([Row("row 1", "messages", messages=tuple(CHAT))], tokenizer, max_length=99)


@pytest.mark.parametrize(
    ("template", "turn", "message"),
    [
        (
            AS_OBJECT.replace("'\n' ~ m.content", "'\n' ~ ('' if m.tool_calls else m.content)"),
            CALLER | {"content": "Let me add."},
            r"turn 2 \(role \"assistant\"\) is silently dropped",
        ),
        (
            AS_OBJECT.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]"),
            CALLER | {"tool_calls": [CALL, CALL]},
            "turn 2 calls a tool, which the model's chat template silently drops",
        ),
        (
            AS_OBJECT.replace(
                "{{ '<|im_end|>\n' }}{% endfor %}",
                "{{ '<|end|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}",
            ),
            CALLER,
            "does not end a call of a tool with the token that ends an answer",
        ),
        (
            AS_OBJECT,
            CALLER
            | {
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
                ]
            },
            r"turn 2 contains `<\|im_end\|>`, which the model's chat template adds itself",
        ),
    ],
)
def test_calls_that_would_be_lost_or_cut_are_refused(chatml, template, turn, message):
    with pytest.raises(BadRows, match=message):
        tokenize_rows([Row("row 1", "messages", messages=(USER, turn))], chatml(template), max_length=999)


def test_held_out_rows_that_end_in_a_call_are_no_questions(chatml):
    tokenizer = chatml(AS_OBJECT)
    ends_in_call = Row(
        "row 1", "messages", messages=(USER, CALLER | {"content": "Let me add."}), tools=(TOOL,)
    )
    ends_in_words = Row("row 2", "messages", messages=tuple(CHAT), tools=(TOOL,))
    (question,) = questions([ends_in_call, ends_in_words], tokenizer)
    assert question.expected == "It is 4."
    assert question.text == generation_prompt(tokenizer, CHAT[:3], [TOOL])
    assert "<tools>" in question.text and question.text.endswith("<|im_start|>assistant\n")


def test_preference_rows_with_tools(tmp_path, chatml):
    tokenizer = chatml(AS_OBJECT)
    pair = {"prompt": [USER], "chosen": [CALLER], "rejected": [ANSWER], "tools": [TOOL]}
    after_result = {
        "conversations": SHAREGPT[:3],
        "chosen": SHAREGPT[3],
        "rejected": {"from": "gpt", "value": "5"},
    }
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (pair, after_result))))
    examples, _ = tokenize_preferences(read_preferences(tmp_path / "a.jsonl"), tokenizer, max_length=999)
    assert tokenizer.decode(examples[0].prompt_ids) == generation_prompt(tokenizer, [USER], [TOOL])
    assert tokenizer.decode(examples[0].chosen_ids).rstrip() == f"{WRITTEN}<|im_end|>"
    assert tokenizer.decode(examples[0].rejected_ids).rstrip() == "It is 4.<|im_end|>"
    assert "<tool_response>" in tokenizer.decode(examples[1].prompt_ids)
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT[:2], "tools": [TOOL], "label": True}))
    (labelled,) = read_labelled(tmp_path / "b.jsonl")
    assert labelled.row.tools == (TOOL,) and labelled.is_desirable


def test_data_shows_calls_as_any_turn(tmp_path, chatml):
    tokenizer = chatml(AS_OBJECT)
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": CHAT, "tools": [TOOL]})] * 2))
    report = inspect_data(tmp_path / "a.jsonl", tokenizer, max_length=999)
    marked = [segment.text for segment in report.shown[0].segments if segment.is_trained]
    assert marked == [f"{WRITTEN}<|im_end|>", "It is 4.<|im_end|>"]
    assert len(report.duplicates) == 1
    assert "add" in report.as_json()


def test_prompts_with_calls_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*CHAT, USER]}))
    with pytest.raises(
        UserError, match="`messages` contains tool calls, which are supported in training only"
    ):
        read_prompts(tmp_path / "a.jsonl")
