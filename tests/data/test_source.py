"""Of a folder with splits only the train split is read, and the reader says so."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from fettle.data import fingerprint, read_rows
from fettle.errors import UserError


def fill(folder: Path, *names: str) -> Path:
    """Write a file of one row for each name; the row's text is the name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_list([{"text": name}]).to_parquet(path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def taken(folder: Path) -> list[str | None]:
    return [row.text for row in read_rows(folder)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0]),
        (["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"], [0]),
        (["data/train-00000-of-00001.parquet", "data/unsupervised-00000-of-00001.parquet"], [0]),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], [0]),
        (["my_train_v2.jsonl", "my_dev_v2.jsonl", "notes.jsonl"], [0]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], [0, 1]),
        (["chats.jsonl", "more.jsonl", "test.jsonl"], [0, 1]),
        # Nothing is for testing: all is data.
        (["more.jsonl", "train.jsonl"], [0, 1]),
        (["contest.jsonl", "evaluate_later.jsonl"], [0, 1]),
        (["data/sft-00000-of-00001.parquet"], [0]),
    ],
)
def test_only_the_train_split_is_taken(tmp_path, names, expected):
    assert taken(fill(tmp_path, *names)) == [names[number] for number in expected]


def test_what_was_taken_and_left_out_is_said(tmp_path):
    fill(tmp_path, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
    assert read_rows(tmp_path).reading.notes == [
        "read the split train: data/train-00000-of-00001.parquet",
        "left out: data/test-00000-of-00001.parquet",
    ]
    assert read_rows(tmp_path / "data" / "test-00000-of-00001.parquet").reading.notes == []


def test_splits_without_train_are_refused(tmp_path):
    fill(tmp_path, "test.jsonl", "validation.jsonl")
    with pytest.raises(UserError, match="has the splits test, validation, but no single `train` split"):
        read_rows(tmp_path)


@pytest.mark.parametrize("split", ["test", "validation", "test_sft"])
def test_a_folder_with_only_rows_for_testing_is_refused(tmp_path, split):
    plain = fill(tmp_path / "plain", f"my-{split}.jsonl")
    carded = fill(tmp_path / "carded", "rows.jsonl")
    (carded / "README.md").write_text(
        CARD.format(configs=f"- data_files: [{{split: {split}, path: rows.jsonl}}]")
    )
    DatasetDict({split: Dataset.from_list([{"text": "exam"}])}).save_to_disk(tmp_path / "saved")
    for folder, name in ((plain, f"my-{split}.jsonl"), (carded, "rows.jsonl"), (tmp_path / "saved", split)):
        with pytest.raises(UserError, match=rf"has only test rows \({name}\), .* give the file .* itself\.$"):
            read_rows(folder)
        assert len(read_rows(folder / name)) == 1


CARD = "---\nlicense: mit\nconfigs:\n{configs}\n---\n# A data set\n"


@pytest.mark.parametrize(
    "configs",
    [
        "- config_name: default\n  data_files:\n  - split: train\n    path: a/learn*\n  - {split: test, path: a/the*}",
        "- config_name: default\n  data_files: a/learn*.jsonl",
        "- config_name: one\n  data_dir: a\n  data_files: {train: learn.jsonl, test: '*exam.jsonl'}",
        "- config_name: x\n  data_files: b/*\n- config_name: y\n  default: true\n  data_files: ['**/learn.jsonl']",
    ],
)
def test_a_data_set_card_names_the_splits(tmp_path, configs):
    fill(tmp_path, "a/learn.jsonl", "a/the_exam.jsonl", "b/other.jsonl")
    (tmp_path / "README.md").write_text(CARD.format(configs=configs))
    assert taken(tmp_path) == ["a/learn.jsonl"]


def test_a_card_with_several_data_sets_is_a_choice_for_the_user(tmp_path):
    fill(tmp_path, "a/train.jsonl", "b/train.jsonl")
    configs = "- config_name: a\n  data_files: a/*\n- config_name: b\n  data_files: b/*"
    (tmp_path / "README.md").write_text(CARD.format(configs=configs))
    with pytest.raises(UserError, match=r"several datasets \(a, b\)"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "head", ["- [", "configs: 4", "configs: [4]", "configs: [{data_files: [4, {}]}]", "[" * 9000]
)
def test_a_card_of_no_use_is_ignored(tmp_path, head):
    fill(tmp_path, "train.jsonl", "test.jsonl")
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert taken(tmp_path) == ["train.jsonl"]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    train, test = (
        Dataset.from_list([{"text": f"{name} {n}"} for n in range(3)]) for name in ("learn", "exam")
    )
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one", num_shards=2)
    expected = ["learn 0", "learn 1", "learn 2"]
    assert (
        taken(tmp_path / "both") == taken(tmp_path / "both" / "train") == taken(tmp_path / "one") == expected
    )
    assert read_rows(tmp_path / "both").reading.notes[1] == "left out: test"
    assert fingerprint(tmp_path / "both") == fingerprint(tmp_path / "both" / "train")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(
        UserError, match=r"is an incomplete saved dataset: data-0+-of-00002\.arrow is missing"
    ):
        read_rows(tmp_path / "one")


def test_one_json_file_may_hold_splits(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": [{"text": "learn"}], "test": [{"text": "exam"}]}))
    rows = read_rows(path)
    assert [row.text for row in rows] == ["learn"]
    assert rows.reading.notes == ["read the split train of a.json; left out: test"]


def test_files_about_the_data_are_no_data(tmp_path):
    fill(tmp_path, "a.jsonl", "dataset_infos.json", "LICENSE.txt", "requirements.txt")
    assert taken(tmp_path) == ["a.jsonl"]


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl: is not a regular file"):
        read_rows(tmp_path / "rows.jsonl")
