"""Rows that cannot be trained on: all are listed in one error, or left out and counted."""

import json
import shutil
from pathlib import Path

import pytest

STRICT_TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Say 1."}
ASSISTANT = {"role": "assistant", "content": "Here is 1!"}
ODD = {
    2: [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "say"}}]}],
    4: [USER, {"role": "assistant", "content": None}],
    5: [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT],
    7: [ASSISTANT, USER, ASSISTANT],
}
REASONS = {
    2: "turn 2 calls a tool, which the model's chat template does not write",
    4: "turn 2: `content` is null",
    5: 'turn 1: unknown role "developer"',
    7: "Conversation roles must alternate",
}


@pytest.fixture
def strict_model(small_model, tmp_path) -> Path:
    folder = Path(shutil.copytree(small_model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(STRICT_TEMPLATE)
    return folder


@pytest.fixture
def odd_rows(tmp_path) -> Path:
    rows = [{"messages": ODD.get(number, [USER, ASSISTANT])} for number in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_all_of_them_are_listed_before_anything_is_written(
    cli, strict_model, odd_rows, chats, tmp_path, option
):
    data = ["--data", odd_rows] if option == "--data" else ["--data", chats, "--eval-data", odd_rows]
    ended = cli("train", "--model", strict_model, *data, "--output", tmp_path / "out", "--max-steps", 1)
    assert ended.code == 2
    assert f"4 of {8 + 24 * (option == '--eval-data')} rows cannot be used" in ended.err
    for number, reason in REASONS.items():
        assert any(f"rows.jsonl, line {number}" in line and reason in line for line in ended.err.splitlines())
    assert "--skip-bad-rows" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
def test_they_are_left_out_and_counted_where_the_user_says_so(cli, strict_model, odd_rows, tmp_path):
    words = (
        "train",
        "--model",
        strict_model,
        "--data",
        odd_rows,
        "--output",
        tmp_path / "out",
        "--max-steps",
        1,
    )
    ended = cli(*words, "--skip-bad-rows", "--eval-data", odd_rows, "--samples", 1, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "became 4 examples" in ended.out
    assert "\n4 bad rows skipped:" in ended.out
    assert "\nheld out: 4 bad rows skipped:" in ended.out
    assert all(reason in ended.out for reason in REASONS.values())
    assert "4 bad rows skipped" in (tmp_path / "out" / "report.html").read_text()
    assert "skip_bad_rows: true" in (tmp_path / "out" / "run.yaml").read_text()


def test_none_but_bad_rows(cli, strict_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": ODD[n]}) for n in (4, 7)))
    words = (
        "train",
        "--model",
        strict_model,
        "--data",
        tmp_path / "rows.jsonl",
        "--output",
        tmp_path / "out",
    )
    ended = cli(*words, "--max-steps", 1)
    assert "2 of 2 rows cannot be used" in ended.err
    ended = cli(*words, "--max-steps", 1, "--skip-bad-rows")
    assert ended.code == 2
    assert "Nothing is left to train on" in ended.err
    assert "2 bad rows skipped" in ended.err
