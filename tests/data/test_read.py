"""Every common file and form is read; every bad one is refused in one sentence that says where."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fettle.data import fingerprint, read_rows
from fettle.errors import UserError

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = {"messages": [USER, ASSISTANT]}
EXPECTED = (USER, ASSISTANT)


def write(path: Path, content: str | bytes | list[Any]) -> Path:
    if isinstance(content, list):
        content = "\n".join(json.dumps(record) for record in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_one(tmp_path: Path, record: Any):
    (row,) = read_rows(write(tmp_path / "a.jsonl", [record]))
    return row


# The forms of a row


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        {"messages": json.dumps([USER, ASSISTANT])},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]}]},
        {"messages": [{"role": "system", "content": " "}, USER, ASSISTANT], "text": "left over", "id": 7},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]},
        {"conversations": [{"from": "User", "value": "Hello"}, {"from": "ChatGPT", "value": "Hello!"}]},
        {"conversations": [USER, ASSISTANT], "tools": "[]", "messages": None},
        {"instruction": "Hello", "input": "", "output": "Hello!"},
        {"instruction": "Hello", "input": None, "output": "Hello!", "history": None, "system": ""},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "Hello!"},
    ],
)
def test_a_chat_is_recognised_by_its_columns(tmp_path, record):
    assert read_one(tmp_path, record).messages == EXPECTED


def test_alpaca_joins_input_and_keeps_system_and_history(tmp_path):
    record = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."}
    row = read_one(tmp_path, record | {"history": [["Hello", "Hello!"]]})
    last = ({"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"})
    assert row.messages == (SYSTEM, USER, ASSISTANT, *last)
    assert row.format == "Alpaca"


def test_prompt_and_completion_stay_text(tmp_path):
    row = read_one(tmp_path, {"prompt": "2 + 2 =", "completion": " 4"})
    assert (row.prompt, row.completion, row.messages) == ("2 + 2 =", " 4", ())


def test_earlier_answers_of_a_prompt_are_not_the_completion(tmp_path):
    row = read_one(tmp_path, {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert len(row.messages) == 4
    assert row.completion_turns == 1


def test_forms_may_be_mixed(tmp_path):
    rows = read_rows(
        write(tmp_path / "a.jsonl", [CHAT, {"text": "Hello"}, {"prompt": "a", "completion": "b"}])
    )
    assert [row.format for row in rows] == ["messages", "text", "prompt / completion"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, r"found columns question, answer; expected messages, .* or text"),
        ({"instruction": "a", "output": None}, r"found column instruction and no value \(null\) in output"),
        ({}, "found no columns"),
        ([1], "found a list; expected an object"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "Hello"}, '`messages` is "Hello"; expected a list'),
        ({"messages": "[{'role': 'user'}]"}, "`messages` is not valid JSON.*double quotes"),
        ({"messages": ["Hello"]}, r'turn 1: found "Hello"; expected \{"role"'),
        ({"messages": [{"role": "user"}]}, "turn 1: found field role but no `content`"),
        (
            {"messages": [USER, {"role": "bot", "content": "a"}]},
            'turn 2: unknown role "bot"; known roles are system',
        ),
        ({"messages": [USER, {"role": None, "content": "a"}]}, "turn 2: unknown role null"),
        (
            {"messages": [USER, {"role": "assistant", "content": 4}]},
            "turn 2: `content` is the number 4; expected text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`content` is null; expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, 'type "image_url"'),
        ({"messages": [USER]}, "has no assistant turn"),
        ({"prompt": [USER], "completion": [USER]}, "has no assistant turn"),
        ({"messages": [USER, {"role": "tool", "content": "4"}]}, "has no assistant turn"),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": [1]}]},
            "`tool_calls` contains the number 1; expected",
        ),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "`value` is not valid JSON"),
        (CHAT | {"tools": [{"names": "f"}]}, "`tools` contains field names but no name"),
        ({"instruction": "a", "output": 4}, "`output` is the number 4; expected text; put it in quotes"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "expected pairs"),
        ({"text": True}, "`text` is the value true"),
        ({"text": "\ud800"}, "half a character"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "has `chosen` and `rejected`, which is preference data",
        ),
        (CHAT | {"label": False}, "has a true/false `label`, which is preference data"),
    ],
)
def test_a_row_of_no_use_is_refused_with_its_place(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", [CHAT, record])
    with pytest.raises(UserError, match=rf"^a\.jsonl, line 2.*{message}"):
        read_rows(path)


# Files


def test_json_holds_a_list_or_data_or_lines(tmp_path):
    contents = [json.dumps([CHAT, CHAT]), json.dumps({"data": [CHAT, CHAT]}), f"{json.dumps(CHAT)}\n" * 2]
    for number, content in enumerate(contents):
        rows = read_rows(write(tmp_path / f"{number}.json", content))
        assert [row.messages for row in rows] == [EXPECTED, EXPECTED]


def test_a_key_twice_is_refused(tmp_path):
    """Python's reader would keep the last value alone."""
    file = write(tmp_path / "rows.jsonl", '{"text": "a", "text": "b"}\n{"text": "c"}\n')
    with pytest.raises(UserError, match=r"the key 'text' is there twice"):
        list(read_rows(file))


def test_json_lines_may_have_blank_lines_and_a_byte_order_mark(tmp_path):
    rows = read_rows(
        write(tmp_path / "a.jsonl", "\ufeff\n" + json.dumps(CHAT) + "\r\n\r\n" + json.dumps(CHAT))
    )
    assert [row.where for row in rows] == ["a.jsonl, line 2", "a.jsonl, line 4"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_reads_quoted_cells_and_json_in_cells(tmp_path, delimiter):
    lines = [["instruction", "input", "output"], ['"Hello,\nyou; there"', "", '"a ""b"""'], ["c", "d", "e"]]
    rows = read_rows(write(tmp_path / "a.csv", "\n".join(delimiter.join(line) for line in lines)))
    assert [m["content"] for row in rows for m in row.messages] == [
        "Hello,\nyou; there",
        'a "b"',
        "c\n\nd",
        "e",
    ]
    assert [row.where for row in rows] == ["a.csv, line 2", "a.csv, line 4"]
    cell = json.dumps(CHAT["messages"]).replace('"', '""')
    (row,) = read_rows(write(tmp_path / "b.csv", f'id,messages\n1,"{cell}"\n'))
    assert row.messages == EXPECTED


def test_csv_reads_very_long_cells(tmp_path):
    (row,) = read_rows(write(tmp_path / "a.csv", 'text,id\n"' + "a" * 200_000 + '",1\n'))
    assert len(row.text or "") == 200_000


def test_parquet_reads_lists_of_turns_and_mixed_columns(tmp_path):
    table = pyarrow.Table.from_pylist([CHAT | {"text": None}, {"messages": None, "text": "Hello"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert rows[0].messages == EXPECTED
    assert (rows[1].text, rows[1].where) == ("Hello", "a.parquet, row 2")


def test_a_text_file_is_one_document(tmp_path):
    (row,) = read_rows(write(tmp_path / "a.txt", "Hello\n\nthere\n"))
    assert (row.text, row.where) == ("Hello\n\nthere\n", "a.txt")


def test_a_folder_is_read_in_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "x.txt", "hidden")
    write(tmp_path / "readme.md", "not data")
    write(tmp_path / "b.txt", "Hello")
    write(tmp_path / "a.jsonl", [CHAT])
    write(tmp_path / "sub" / "c.csv", "text\nHello\n")
    assert [row.where for row in read_rows(tmp_path)] == ["a.jsonl, line 1", "b.txt", "sub/c.csv, line 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.txt", " \n\n", "a.txt: the file is empty"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", b"\x7fELF\0\0\1", "a.jsonl: the file is binary"),
        ("a.jsonl", '{"text": "é"}'.encode("utf-16"), "a.jsonl: the file is UTF-16"),
        ("a.txt", b"one\ncaf\xe9\n", "a.txt, line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2, column 13: malformed JSON"),
        ("a.json", '[\n  {"text": "a"},\n  {"text" "b"}\n]', "a.json, line 3, column 11: malformed JSON"),
        ("a.json", '{"text": "a"}\n{"text": "b"', "a.json, line 2, column 13: malformed JSON"),
        ("a.json", "4", "expected a list of rows"),
        ("a.csv", 'text,id\na,1\n"b,2\n', "a.csv, line 3: malformed CSV"),
        ("a.csv", "text,id\na,1\nb,2,3\n", "a.csv, line 3: has 3 cells, but the header has 2"),
        ("a.csv", "Hello,you\na,b\n", "a.csv, line 2: found columns Hello, you"),
        ("a.parquet", "PAR1 not really", "a.parquet: is not a readable parquet file"),
        ("a.xlsx", "a", r"a.xlsx: has the extension .xlsx; expected .jsonl, .json, .csv, .parquet, .txt"),
        ("data", "a", "data: has no file extension"),
    ],
)
def test_a_file_of_no_use_is_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_missing_and_empty_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_rows(tmp_path / "chats.jsonl")
    with pytest.raises(UserError, match="no such file or folder"):
        read_rows("data/chats.jsonl")
    with pytest.raises(UserError, match="the folder has no data files"):
        read_rows(tmp_path)


def test_a_hub_name_without_network_is_refused():
    with pytest.raises(
        UserError, match=r"^nobody/nothing-of-this-name: is not a local file or folder.*network"
    ):
        read_rows("nobody/nothing-of-this-name")


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl", [CHAT])
    first = fingerprint(path)
    assert first == fingerprint(write(tmp_path / "copy.jsonl", [CHAT]))
    assert first != fingerprint(write(path, [CHAT, CHAT]))
    assert fingerprint(tmp_path) != fingerprint(path)
    with pytest.raises(UserError, match="no such file"):
        fingerprint(tmp_path / "missing.jsonl")
