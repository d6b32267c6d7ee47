"""Every common form of preference data is read; every row that is no clear comparison is refused, with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fettle.data import (
    BadRows,
    LabelledRow,
    PreferenceRow,
    labelled_of,
    read_labelled,
    read_preferences,
    read_rows,
    split_held_out,
)
from fettle.errors import UserError
from fettle.options import flag

USER = {"role": "user", "content": "Hello"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go away."}
AGAIN = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN = {"from": "human", "value": "Hello"}
GOOD_TURN = {"from": "gpt", "value": "Hello!"}
BAD_TURN = {"from": "gpt", "value": "Go away."}
TEXTS = {"chosen": "Hello!", "rejected": "Go away."}
TURNS = {"chosen": [GOOD], "rejected": [BAD]}
ONE_TURN = {"chosen": GOOD_TURN, "rejected": BAD_TURN}
CHATS = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hello!",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Go away.",
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def read_pair(tmp_path: Path, record: Any) -> PreferenceRow:
    (row,) = read_preferences(write(tmp_path / "a.jsonl", record))
    return row


def read_label(tmp_path: Path, record: Any) -> LabelledRow:
    (row,) = read_labelled(write(tmp_path / "a.jsonl", record))
    return row


# Pairs


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], **TURNS},
        {"prompt": [USER], **TEXTS},
        {"prompt": "Hello", **TURNS},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        CHATS,
        {"prompt": "Hello", **CHATS},
        {"prompt": [USER], **CHATS},
        {"prompt": "Hello", "messages": [USER, GOOD], **CHATS},
        {"conversations": [HUMAN], **ONE_TURN},
        {"conversations": [HUMAN], "chosen": [GOOD_TURN], "rejected": [BAD_TURN]},
        {"conversations": [HUMAN], **TEXTS},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"instruction": "Hello", "input": "", **TEXTS},
        HH,
        {"prompt": "\n\nHuman: Hello\n\nAssistant:", **TEXTS},
        {"question": [USER], **TEXTS},
    ],
)
def test_a_pair_of_chats_is_recognised_by_its_columns(tmp_path, record):
    row = read_pair(tmp_path, record)
    assert row.prompt == (USER,)
    assert (row.chosen.messages, row.rejected.messages) == ((USER, GOOD), (USER, BAD))
    assert row.chosen.completion_turns == row.rejected.completion_turns == 1
    assert row.where == "a.jsonl, line 1"


@pytest.mark.parametrize("column", ["prompt", "question"])
def test_a_pair_of_texts_stays_text(tmp_path, column):
    row = read_pair(tmp_path, {column: "Hello", **TEXTS})
    assert (row.prompt, row.chosen.completion, row.rejected.completion) == ("Hello", "Hello!", "Go away.")


def test_alpacas_pairs_have_input_history_and_a_system_text(tmp_path):
    record = {
        "instruction": "Add.",
        "input": "2 and 2",
        "history": [["Hello", "Hello!"]],
        "system": "Be brief.",
    }
    row = read_pair(tmp_path, record | {"chosen": "4", "rejected": "5"})
    assert row.prompt == (SYSTEM, USER, GOOD, {"role": "user", "content": "Add.\n\n2 and 2"})
    assert (row.format, row.rejected.messages[-1]["content"]) == ("Alpaca", "5")


@pytest.mark.parametrize("record", [CHATS, {"question": "Hello", **TEXTS}, {"prompt": [USER], **TURNS}])
def test_a_system_column_belongs_to_both_sides(tmp_path, record):
    row = read_pair(tmp_path, {"system": "Be brief.", **record})
    assert row.prompt == (SYSTEM, USER)
    assert (row.chosen.messages, row.rejected.messages) == ((SYSTEM, USER, GOOD), (SYSTEM, USER, BAD))


def test_the_last_answer_of_long_chats_is_compared(tmp_path):
    before = [USER, GOOD, AGAIN]
    row = read_pair(tmp_path, {"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    assert (row.prompt, row.chosen.completion_turns) == (tuple(before), 1)


def test_several_answers_are_compared_if_several_differ(tmp_path):
    row = read_pair(tmp_path, {"chosen": [USER, GOOD, AGAIN, GOOD], "rejected": [USER, BAD]})
    assert row.prompt == (USER,)
    assert (row.chosen.completion_turns, row.rejected.completion_turns) == (3, 1)


@pytest.mark.parametrize(
    "words",
    [
        '{"a": 1}',
        '[{"name": "Ann"}]',
        "[1] is the source",
        "{x} is a set",
        '[{"role": "admin", "name": "Ann"}]',
        '{"role": "user", "content": "a"}',
    ],
)
def test_an_answer_in_json_is_text(tmp_path, words):
    row = read_pair(tmp_path, {"prompt": "Give JSON.", "chosen": words, "rejected": "No."})
    assert row.chosen.completion == words
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"prompt": "Give JSON.", "completion": words}))
    assert row.completion == words


def test_scores_and_the_like_are_unused(tmp_path):
    extra = {"score_chosen": 8.5, "score_rejected": 2, "rejected_model": "a", "prompt_id": "7"}
    row = read_pair(tmp_path, CHATS | extra | {"messages": CHATS["chosen"], "prompt": "Hello"})
    assert sorted(row.chosen.unused) == sorted([*extra, "messages", "prompt"])


def test_a_pair_of_weight_0_is_marked(tmp_path):
    row = read_pair(tmp_path, CHATS | {"weight": 0})
    assert not row.chosen.is_trained
    assert not row.rejected.is_trained


def test_a_table_of_pairs_of_several_kinds(tmp_path):
    """As `datasets` writes it: every row has every column."""
    columns = {"messages": None, "prompt": None, "chosen": None, "rejected": None}
    records = [columns | CHATS, columns | {"prompt": "", "messages": [USER], **TURNS}]
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    rows = read_preferences(tmp_path / "a.parquet")
    assert [row.chosen.messages for row in rows] == [(USER, GOOD)] * 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [USER, GOOD]},
            "found column messages; expected chosen and rejected, with their question",
        ),
        ([1], "found a list; expected an object with named columns: chosen and rejected"),
        (
            {"messages": [USER, GOOD], "label": True},
            "has no `chosen` and `rejected`, but a `label` of one answer; for such rows use method kto",
        ),
        ({"prompt": "Hello", "chosen": "Hello!"}, "there is no `rejected`"),
        ({"prompt": "Hello", "chosen": "Hello!", "rejected": None}, "there is no `rejected`"),
        ({"prompt": "Hello", "chosen": " ", "rejected": "Go away."}, "`chosen` is empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": []}, "`rejected` is empty"),
        ({"prompt": [USER], "chosen": [GOOD | {"content": ""}], "rejected": [BAD]}, "`chosen` is empty"),
        (HH | {"chosen": "\n\nHuman: Hello\n\nAssistant:"}, "`chosen` is empty"),
        (TEXTS, "has `chosen` and `rejected`, but no question; expected it in prompt, question"),
        ({"prompt": "", **TEXTS}, "but no question"),
        (
            {"prompt": "Hello", "chosen": "Hello!", "rejected": "Hello! \n"},
            "are the same answer; remove the row",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "are the same answer"),
        (
            {"chosen": [USER, GOOD], "rejected": [AGAIN, BAD]},
            "do not answer the same question: turn 1, the first that differs, is a turn of the user in `chosen` and "
            "a turn of the user in `rejected`",
        ),
        (
            {"chosen": [USER, GOOD, AGAIN, GOOD], "rejected": [USER, GOOD]},
            "turn 3, the first that differs, is a turn of the user in `chosen` and missing in `rejected`",
        ),
        (
            {"prompt": "Good day", **CHATS},
            "has `prompt`, but `chosen` and `rejected` already have a question, which does not contain it",
        ),
        ({"prompt": [AGAIN], **CHATS}, "has `prompt`, but `chosen` and `rejected` already have a question"),
        ({"messages": [AGAIN, GOOD], **CHATS}, "has `messages`, but `chosen` and `rejected` already have"),
        (
            {"conversations": [HUMAN], "prompt": "Why?", **ONE_TURN},
            "has `prompt`, but `chosen` and `rejected`",
        ),
        ({"prompt": "Hello", "input": "Why?", **TEXTS}, "has `input`, which the prompt / completion format"),
        ({"chosen": [USER, GOOD], "rejected": "Go away."}, "is a whole chat, the other only an answer"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "`rejected` ends with the turn of the user"),
        (
            {"prompt": [USER], "chosen": [GOOD, AGAIN], "rejected": [BAD]},
            "`chosen` ends with the turn of the user",
        ),
        (
            {"messages": [USER, GOOD], **TEXTS},
            "the question ends with the turn of the assistant; expected one of",
        ),
        (
            {"prompt": "Hello", "chosen": 5, "rejected": "6"},
            "`chosen` is the number 5; expected text; put it in",
        ),
        (
            {"prompt": [USER], "chosen": [{"role": "bot", "content": "a"}], "rejected": [BAD]},
            "chosen, turn 1: unknown",
        ),
        (
            {"conversations": [HUMAN], **ONE_TURN, "chosen": {"value": "a"}},
            "chosen: found field value but no `role`",
        ),
        (
            CHATS | {"reasoning": "Greet."},
            "has a column `reasoning`, but it is not clear which answer it belongs to",
        ),
        (CHATS | {"tools": [{"type": "function"}]}, "`tools` contains field type but no name"),
        (CHATS | {"images": ["a.png"]}, "has `images`, but fettle trains on text only"),
        (CHATS | {"weight": 0.5}, r"`weight` is the number 0\.5; expected 0 or 1"),
    ],
)
def test_what_is_no_clear_pair_is_refused_with_its_place(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", CHATS, record)
    with pytest.raises(UserError, match=rf"^a\.jsonl, line 2.*{message}"):
        read_preferences(path)
    assert len(read_preferences(path, skip_bad_rows=True)) == 1


def test_all_bad_pairs_are_listed_in_one_error(tmp_path):
    path = write(tmp_path / "a.jsonl", CHATS, TEXTS, {"prompt": "a"}, CHATS)
    with pytest.raises(BadRows, match="2 of 4 rows cannot be used") as caught:
        read_preferences(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "a.jsonl, line 2",
        "a.jsonl, line 3",
    ]
    assert len(read_preferences(path, skip_bad_rows=True).reading.bad) == 2


# Labelled answers


@pytest.mark.parametrize(
    "fields", [{"label": True}, {"kto_tag": True}, {"label": "True"}, {"label": True, "kto_tag": True}]
)
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, GOOD]},
        {"conversations": [HUMAN, GOOD_TURN]},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": "Hello", "completion": [GOOD]},
        {"instruction": "Hello", "output": "Hello!"},
    ],
)
def test_a_labelled_chat_is_recognised_by_its_columns(tmp_path, record, fields):
    row = read_label(tmp_path, record | fields)
    assert (row.prompt, row.row.messages, row.is_desirable) == ((USER,), (USER, GOOD), True)
    assert row.row.unused == ()


def test_a_labelled_text_stays_text(tmp_path):
    row = read_label(tmp_path, {"prompt": "Hello", "completion": "Go away.", "label": False})
    assert (row.prompt, row.row.completion, row.is_desirable) == ("Hello", "Go away.", False)


def test_a_label_is_that_of_the_last_answer(tmp_path):
    row = read_label(tmp_path, {"messages": [USER, GOOD, AGAIN, BAD], "label": False})
    assert row.prompt == (USER, GOOD, AGAIN)


def test_the_cells_of_a_csv_can_be_labels(tmp_path):
    cells = ["true", "FALSE", "1", "0"]
    lines = ["prompt,completion,label", *(f"Hello,Hello!,{cell}" for cell in cells)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    assert [row.is_desirable for row in read_labelled(tmp_path / "a.csv")] == [True, False, True, False]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": 1}, "`label` is the number 1; expected true"),
        ({"label": 0}, "`label` is the number 0; expected true"),
        ({"label": 0.5}, r"`label` is the number 0\.5; expected true"),
        ({"label": "good"}, '`label` is "good"; expected true'),
        ({"kto_tag": [True]}, "`kto_tag` is a list; expected true"),
        ({"label": True, "kto_tag": False}, "`label` and `kto_tag` contradict each other"),
        ({"label": None}, "found column messages but no `label` of true or false"),
        ({}, "found column messages but no `label` of true or false"),
        ({"label": True, "messages": [USER, GOOD, AGAIN]}, "the answer ends with the turn of the user"),
        ({"label": True, "messages": [USER, GOOD | {"content": " "}]}, "the answer is empty"),
        ({"label": True, "messages": None, "prompt": "a", "completion": " "}, "`completion` is empty"),
        ({"label": True, "messages": None, "text": "a"}, "has a label for a `text`, in which the answer"),
        ({"label": True, "messages": [USER]}, "has no assistant turn"),
        ({"label": True, "messages": None, "prompt": "a"}, "found column prompt; expected messages"),
        ({"label": True, "tools": [1]}, "`tools` contains the number 1; expected"),
    ],
)
def test_what_is_no_clear_label_is_refused_with_its_place(tmp_path, record, message):
    chat = {"messages": [USER, GOOD]}
    path = write(tmp_path / "a.jsonl", chat | {"label": True}, chat | record)
    with pytest.raises(UserError, match=rf"^a\.jsonl, line 2.*{message}"):
        read_labelled(path)
    assert len(read_labelled(path, skip_bad_rows=True)) == 1


def test_a_pair_is_a_good_answer_and_a_bad_one(tmp_path):
    labelled = {"messages": [USER, GOOD], "label": True}
    path = write(tmp_path / "a.jsonl", CHATS, labelled, {"prompt": "Hello", **TEXTS}, TEXTS)
    rows = read_labelled(path, skip_bad_rows=True)
    assert [row.is_desirable for row in rows] == [True, False, True, True, False]
    assert [row.row.messages[-1:] for row in rows] == [(GOOD,), (BAD,), (GOOD,), (), ()]
    assert len(rows.reading.bad) == 1
    pairs = read_preferences(write(tmp_path / "b.jsonl", CHATS, TEXTS), skip_bad_rows=True)
    assert [row.row for row in labelled_of(pairs)] == [pairs[0].chosen, pairs[0].rejected]
    assert labelled_of(pairs).reading == pairs.reading


# What both are for


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (CHATS, "train on it with --method dpo, or keep only the good answers"),
        (
            {"messages": [USER, GOOD], "label": True},
            "train on it with --method kto, or keep only the good answers",
        ),
    ],
)
def test_supervised_training_names_the_method_for_the_row(tmp_path, record, words):
    with pytest.raises(UserError) as caught:
        read_rows(write(tmp_path / "a.jsonl", record))
    assert words in caught.value.worded(flag)
    assert words.replace("--", "") in str(caught.value)
    rows = read_rows(write(tmp_path / "a.jsonl", {"messages": [USER, GOOD]}, record), skip_bad_rows=True)
    assert words in UserError(rows.reading.bad[0]).worded(flag)


def test_rows_with_one_question_are_held_out_together(tmp_path):
    records = [{"prompt": f"Say {n // 4}.", "chosen": f"{n}!", "rejected": f"{n}?"} for n in range(80)]
    pairs = read_preferences(write(tmp_path / "a.jsonl", *records))
    for rows in (pairs, labelled_of(pairs)):
        train, held_out = split_held_out(rows, fraction=0.2, seed=0)
        assert len(held_out) == 0.2 * len(rows)
        assert not {row.prompt for row in train} & {row.prompt for row in held_out}
