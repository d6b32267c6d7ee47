"""What a row says besides its words: weights, reasoning, system texts, columns that are not part of its form."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from fettle.data import BadRows, Row, read_rows
from fettle.errors import UserError

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "Hello", "completion": "Hello!"}


def read_one(tmp_path: Path, record: Any) -> Row:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (row,) = read_rows(tmp_path / "a.jsonl")
    return row


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, ASSISTANT | fields]}


@pytest.mark.parametrize(
    "fields",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"weight": 0, "train": False}],
)
def test_an_answer_of_weight_0_is_marked(tmp_path, fields):
    assert read_one(tmp_path, answer(**fields)).messages == (USER, ASSISTANT | {"train": False})
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!", **fields}]
    assert read_one(tmp_path, {"conversations": turns}).messages == (USER, ASSISTANT | {"train": False})


@pytest.mark.parametrize("fields", [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"weight": None}])
def test_an_answer_of_weight_1_is_an_answer(tmp_path, fields):
    assert read_one(tmp_path, answer(**fields)).messages == (USER, ASSISTANT)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (answer(weight=0.5), r"turn 2: `weight` is the number 0\.5; expected 0 or 1"),
        (answer(weight="high"), '`weight` is "high"; expected 0 or 1'),
        (answer(weight=1, train=False), "`weight` and `train` contradict each other"),
        (answer(loss_mask=[0, 1]), "has `loss_mask`, which masks parts of a turn"),
        (CHAT | {"weight": 0.3}, r"`weight` is the number 0\.3"),
        (answer(images=["a.png"]), "has `images`, but fettle trains on text only"),
        (CHAT | {"images": ["a.png"]}, "has `images`, but fettle trains on text only"),
        (answer(reasoning="a", thinking="b"), "has `reasoning` and `thinking` with different text"),
        (answer(reasoning=["a"]), "`reasoning` is a list; expected text"),
        (
            answer(content=[{"type": "text", "text": "Hello!", "image_url": {"url": "a.png"}}]),
            "a text part of `content` also has field image_url, which would be lost",
        ),
        (
            {"messages": [SYSTEM, USER, ASSISTANT], "system": "Be kind."},
            "a different system text as well",
        ),
        (
            PAIR | {"input": "Good day"},
            "has `input`, which the prompt / completion format does not use",
        ),
        (PAIR | {"history": [["a", "b"]]}, "has `history`, which the prompt / completion format"),
        (CHAT | {"history": [["a", "b"]]}, "has `history`, which the messages format does not use"),
        (
            {"instruction": "a", "output": "b", "context": "c"},
            "has `context`, which the Alpaca format does not use",
        ),
        ({"text": "a", "system": "Be brief."}, "has `system`, which the text format does not use"),
        (CHAT | {"thinking": "Greet back."}, "it is not clear which answer it belongs to"),
        (
            {"instruction": "a", "output": "b", "kto_tag": True},
            "a true/false `kto_tag`, which is preference data",
        ),
        (PAIR | {"rejected_response": "Go away"}, "has `rejected_response`, which is preference data"),
    ],
)
def test_what_changes_the_meaning_and_has_no_place_is_refused(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_one(tmp_path, record)


@pytest.mark.parametrize(
    "record",
    [
        CHAT | {"system": "Be brief."},
        CHAT | {"system_prompt": "Be brief."},
        {"messages": [SYSTEM, USER, ASSISTANT], "system": "Be brief."},
        {"conversations": [USER, ASSISTANT], "system": "Be brief."},
        {"instruction": "Hello", "output": "Hello!", "system": "Be brief."},
        PAIR | {"system": "Be brief."},
        {"prompt": [USER], "completion": [ASSISTANT], "system": "Be brief."},
    ],
)
def test_a_system_column_is_a_system_turn_in_every_form(tmp_path, record):
    row = read_one(tmp_path, record)
    assert row.messages == (SYSTEM, USER, ASSISTANT)
    assert row.unused == ()


@pytest.mark.parametrize("record", [{"instruction": "Hello", "output": "Hello!"}, PAIR])
def test_a_reasoning_column_belongs_to_the_one_answer(tmp_path, record):
    row = read_one(tmp_path, record | {"reasoning": "Greet back."})
    assert row.messages[-1] == ASSISTANT | {"reasoning": "Greet back."}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"instruction": "a", "output": "c", "reasoning": "use"}, "use"),
        ({"prompt": "What is 2+2?", "completion": "The answer is 4.", "thinking": "4"}, "4"),
        ({"prompt": "What is 4?", "completion": "4", "thinking": "What is 4?"}, "What is 4?"),
        ({"prompt": [USER], "completion": [ASSISTANT], "reasoning_content": "Hello!"}, "Hello!"),
    ],
)
def test_reasoning_is_kept_though_its_words_occur_elsewhere(tmp_path, record, words):
    row = read_one(tmp_path, record)
    assert [words in turn.values() for turn in row.messages[:-1]] == [words == row.messages[0]["content"]]
    (name,) = row.messages[-1].keys() - {"role", "content"}
    assert (row.messages[-1][name], row.unused) == (words, ())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (CHAT | {"thinking": "Hello"}, "it is not clear which answer it belongs to"),
        (
            {"text": "Greet back. Hello!", "reasoning": "Greet back."},
            "it is not clear which answer it belongs to",
        ),
        (
            {"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT], "thinking": "Greet."},
            "it is not clear which answer",
        ),
        (
            {"prompt": [USER], "completion": [ASSISTANT, USER], "thinking": "Greet."},
            "it is not clear which answer",
        ),
        (PAIR | {"thinking": ["Greet."]}, "`thinking` is a list; expected text"),
        (PAIR | {"thinking": "a", "reasoning": "b"}, "`reasoning` and `thinking` with different text"),
        (
            {"prompt": "Hello", "completion": "<think>Greet.</think>Hello!", "thinking": "Greet."},
            "the answer contains reasoning in <think> too; keep one of them",
        ),
        (
            {"prompt": [USER], "completion": [ASSISTANT | {"thinking": "a"}], "thinking": "b"},
            "has a column `thinking`, but the answer has a different `thinking`; keep one of them",
        ),
    ],
)
def test_a_reasoning_column_that_has_no_place_is_refused(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_one(tmp_path, record)


@pytest.mark.parametrize(
    ("record", "column"),
    [
        ({"prompt": "What is 24 minus the input?", "completion": "20", "input": "4"}, "input"),
        ({"prompt": "What is 16 / 4?", "completion": "4", "input": "4"}, "input"),
        ({"prompt": [USER], "completion": [ASSISTANT], "context": "user"}, "context"),
        ({"instruction": "a", "output": "b", "context": "user"}, "context"),
        (CHAT | {"history": "as"}, "history"),
        (PAIR | {"context": "[INST]"}, "context"),
        ({"text": "Hello there", "system": "Hello"}, "system"),
        (
            {"prompt": "<|im_start|>user\nHello<|im_end|>", "completion": "Hello!", "context": "user"},
            "context",
        ),
    ],
)
def test_a_part_of_the_question_is_not_found_inside_other_words(tmp_path, record, column):
    with pytest.raises(UserError, match=f"has `{column}`, which the"):
        read_one(tmp_path, record)


@pytest.mark.parametrize(
    "prompt",
    [
        "Good day.\n\nHow are you?",
        "Answer this.\n\nGood day.\nHow are you?\n",
        "### Input:\n  Good day.\n  How are you?\n### Response:",
        "<|im_start|>user\nGood day.\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] Good day.\nHow are you? [/INST]",
    ],
)
def test_whole_lines_of_the_question_are_what_it_was_made_from(tmp_path, prompt):
    words = "Good day.\nHow are you?"
    assert read_one(tmp_path, {"prompt": prompt, "completion": "Fine", "input": words}).unused == ("input",)


def test_a_reasoning_column_of_true_or_false_has_no_words(tmp_path):
    assert read_one(tmp_path, CHAT | {"reasoning": True}).unused == ("reasoning",)


def test_fields_of_a_message_reach_the_template_unless_they_are_empty(tmp_path):
    turns = [
        USER | {"name": "Ann", "tool_calls": [], "audio": None},
        ASSISTANT | {"reasoning_content": "Greet."},
    ]
    row = read_one(tmp_path, {"messages": turns})
    assert row.messages == (USER | {"name": "Ann"}, ASSISTANT | {"reasoning_content": "Greet."})


def test_columns_beside_the_form_are_named(tmp_path):
    row = read_one(tmp_path, PAIR | {"id": 7, "source": "web", "input": "Hello", "empty": None, "tools": []})
    assert row.unused == ("id", "source", "input")  # the prompt has the words of the input
    assert read_one(tmp_path, CHAT | {"text": "left over"}).unused == ("text",)


def test_a_weight_column_of_0_is_kept_with_the_row(tmp_path):
    assert not read_one(tmp_path, {"text": "Hello", "weight": 0}).is_trained
    assert read_one(tmp_path, {"text": "Hello", "weight": 1}).is_trained


@pytest.mark.parametrize(
    "fields", [{"train": 0}, {"loss_weight": 0}, {"trainable": False}, {"training": "False"}, {"loss": 0.0}]
)
def test_a_row_says_that_it_is_not_trained_as_a_turn_does(tmp_path, fields):
    assert read_one(tmp_path, answer(**fields)).messages[-1]["train"] is False
    row = read_one(tmp_path, CHAT | fields)
    assert (row.is_trained, row.unused) == (False, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": 2}, "`train` is the number 2; expected 0 or 1"),
        ({"train": "split-a"}, '`train` is "split-a"; expected 0 or 1'),
        ({"loss_weight": 0.5}, r"`loss_weight` is the number 0\.5; expected 0 or 1"),
        ({"weight": 1, "trainable": 0}, "`weight` and `trainable` contradict each other"),
    ],
)
def test_a_weight_that_is_neither_0_nor_1_is_refused_in_rows_and_turns(tmp_path, fields, message):
    for record in (CHAT | fields, answer(**fields)):
        with pytest.raises(UserError, match=message):
            read_one(tmp_path, record)


def test_a_measured_loss_is_metadata(tmp_path):
    row = read_one(tmp_path, CHAT | {"loss": 2.31})
    assert (row.is_trained, row.unused) == (True, ("loss",))
    assert read_one(tmp_path, answer(loss=2.31)).messages == (USER, ASSISTANT | {"loss": 2.31})


@pytest.mark.parametrize("column", ["weight", "train", "loss"])
def test_the_cells_of_a_csv_can_be_weights(tmp_path, column):
    cells = ["0", "false", "FALSE", "0.0", "1", "True", ""]
    lines = [f"{column},text", *(f"{cell},Hello" for cell in cells)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    rows = read_rows(tmp_path / "a.csv")
    assert [row.is_trained for row in rows] == [False] * 4 + [True] * 3
    assert not any(row.unused for row in rows)
    (tmp_path / "a.csv").write_text("weight,text\n0.5,Hello")
    with pytest.raises(UserError, match=r'`weight` is "0\.5"; expected 0 or 1'):
        read_rows(tmp_path / "a.csv")


def test_a_table_of_rows_of_several_kinds(tmp_path):
    """As `datasets` writes it: every row has every column, every turn every field."""
    fields = dict.fromkeys(("role", "content", "from", "value", "tool_calls", "weight"))
    messages = [fields | USER, fields | ASSISTANT | {"weight": 1}]
    sharegpt = [fields | {"from": "human", "value": "Hello"}, fields | {"from": "gpt", "value": "Hello!"}]
    columns: dict[str, Any] = {
        "messages": [],
        "conversations": None,
        "text": None,
        "prompt": "",
        "completion": "",
    }
    records = [
        columns | {"messages": messages},
        columns | {"messages": sharegpt},
        columns | {"conversations": sharegpt},
        columns | {"text": "Hello"},
        columns | PAIR,
    ]
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert [row.messages for row in rows] == [(USER, ASSISTANT)] * 3 + [()] * 2
    assert (rows[3].text, rows[4].prompt) == ("Hello", "Hello")
    assert not any(row.unused for row in rows)


def test_nan_counts_as_absent(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "Hello", "input": NaN, "output": "Hello!"}]')
    assert read_rows(tmp_path / "a.json")[0].messages == (USER, ASSISTANT)
    (tmp_path / "a.json").write_text('[{"prompt": "Hello", "completion": NaN}]')
    with pytest.raises(UserError, match=r"found column prompt and no value \(NaN\) in completion"):
        read_rows(tmp_path / "a.json")


def test_nan_in_a_csv_is_a_word(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nWhat is 0 / 0?,NaN\n")
    assert read_rows(tmp_path / "a.csv")[0].completion == "NaN"


def test_an_empty_answer_does_not_turn_the_row_into_another_form(tmp_path):
    record = {"instruction": "Hello", "input": "", "output": "", "text": "### Instruction: Hello"}
    assert read_one(tmp_path, record).format == "Alpaca"


@pytest.mark.parametrize(
    ("name", "way_out"), [("a.jsonl", "put it in quotes"), ("a.parquet", "convert the column to text")]
)
def test_a_number_for_text_is_mended_in_the_file_it_is_in(tmp_path, name, way_out):
    record = {"prompt": "2 + 3 =", "completion": 5}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"`completion` is the number 5; expected text; {way_out}\.$"):
        read_rows(tmp_path / name)


# Rows that cannot be used

BAD = ['{"messages": []}', '{"text": 4}', "{", '{"question": "a"}']


def test_all_bad_rows_are_listed_in_one_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(CHAT), *BAD, json.dumps(CHAT)] + BAD * 3))
    with pytest.raises(BadRows) as caught:
        read_rows(tmp_path / "a.jsonl")
    first, *lines = str(caught.value).splitlines()
    assert first == "16 of 18 rows cannot be used:"
    assert [line.strip().split(":")[0].split(", column")[0] for line in lines[:5]] == [
        f"a.jsonl, line {number}" for number in (2, 3, 4, 5, 7)
    ]
    assert lines[10].strip() == "and 6 more."
    assert len(caught.value.problems) == 16


def test_bad_rows_can_be_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(CHAT), *BAD, json.dumps(PAIR)]))
    rows = read_rows(tmp_path / "a.jsonl", skip_bad_rows=True)
    assert [row.where for row in rows] == ["a.jsonl, line 1", "a.jsonl, line 6"]
    assert len(rows.reading.bad) == 4
    (tmp_path / "a.jsonl").write_text("\n".join(BAD))
    with pytest.raises(BadRows, match="4 of 4 rows"):
        read_rows(tmp_path / "a.jsonl", skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "id": ' + "1" * 10_000 + "}", "a number has more than 4,300 digits"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "nested too deeply"),
        ("a.csv", "messages\n" + "[" * 100_000, "nested too deeply"),
        (
            "a.jsonl",
            json.dumps(answer(note=json.loads("[" * 500 + "1" + "]" * 500))),
            "nested more than 32 levels",
        ),
        ("a.jsonl", json.dumps(answer(note="\ud800")), "half a character"),
        ("a.jsonl", json.dumps({"\ud800": 1}), r"found column \\ud800"),
        ("a.csv", '"text', "a.csv, line 1: malformed CSV"),
        ("a.csv", "text,text\na,b\n", "has two columns named text"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer"),
        ("a.arrow", "ARROW1 not really", "a.arrow: is not a readable arrow file"),
        ("a.arrow", "nothing of the kind", "a.arrow: is not a readable arrow file"),
    ],
)
def test_hostile_files_are_refused_in_words(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(tmp_path / name)
    str(caught.value).encode()


def test_damaged_parquet_is_refused_in_words(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Hello"] * 100}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for start in range(4, len(whole), len(whole) // 40):
        (tmp_path / "a.parquet").write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
        try:
            read_rows(tmp_path / "a.parquet")
        except UserError as error:
            str(error).encode()


def test_a_file_name_that_is_no_utf8_is_written_with_escapes(tmp_path):
    path = Path(f"{tmp_path}/chats-\udcff.jsonl")
    path.write_text(json.dumps(CHAT) + "\n{}")
    assert read_rows(path, skip_bad_rows=True)[0].where == r"chats-\xff.jsonl, line 1"
    with pytest.raises(UserError, match=r"^chats-\\xff\.jsonl, line 2"):
        read_rows(path)
    path.unlink()
    with pytest.raises(UserError, match=r"chats-\\xff\.jsonl: no such file or folder"):
        read_rows(path)
