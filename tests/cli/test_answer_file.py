"""`fettle generate --prompts`: every row is answered once, in order, however often the command is stopped."""

import json

import pytest

from fettle.engine.load import load
from fettle.engine.request import Sampling
from fettle.engine.text import Engine

PROMPTS = [
    {"prompt": "Say 3.", "id": 7},
    {"messages": [{"role": "user", "content": "Say 4."}]},
    {"prompt": "What is the capital of France?", "note": None},
    {"conversations": [{"from": "human", "value": "Say 5."}]},
    *({"prompt": f"Say {n}."} for n in range(6, 12)),
]
WORDS = ("--device", "cpu", "--max-new-tokens", 6)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return file


@pytest.fixture
def generate(cli, small_model, prompts, tmp_path):
    def run(*words, output="answers.jsonl"):
        return cli(
            *(
                "generate",
                "--model",
                small_model,
                "--prompts",
                prompts,
                "--output",
                tmp_path / output,
                *WORDS,
            ),
            *words,
        )

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_gets_its_answer_and_keeps_its_columns(generate, small_model, tmp_path):
    done = generate()
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'answers.jsonl'}\n"
    texts = ["Say 3.", "Say 4.", "What is the capital of France?", *(f"Say {n}." for n in range(5, 12))]
    wanted = Engine(*load(small_model, device="cpu")).generate(texts, Sampling(max_new_tokens=6))
    assert rows(tmp_path / "answers.jsonl") == [
        {**row, "answer": answer} for row, answer in zip(PROMPTS, wanted, strict=True)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "answers.jsonl"}
    again = generate()
    assert again.code == 2 and "answers.jsonl already exists" in again.err and "--overwrite" in again.err
    assert generate("--overwrite").code == 0


@pytest.mark.parametrize(
    "how", [[], ["--temperature", "1.3", "--seed", "5", "--top-k", "9"]], ids=["greedy", "seed"]
)
def test_finished_answers_are_kept_and_the_rest_resumes(generate, tmp_path, monkeypatch, how):
    assert generate(*how, output="whole.jsonl").code == 0
    complete = Engine.complete

    def stopped(self, *args, on_answer, **options):
        def keep(place, answer):
            on_answer(place, answer)
            if place == 3:
                raise KeyboardInterrupt  # the signal is ignored where a shell runs the tests in the background

        return complete(self, *args, on_answer=keep, **options)

    monkeypatch.setattr(Engine, "complete", stopped)
    interrupted = generate(*how)
    assert interrupted.code == 130 and "Resume with:" in interrupted.err
    assert not (tmp_path / "answers.jsonl").exists()
    unfinished = tmp_path / "answers.jsonl.unfinished"
    kept = rows(unfinished)[1:]
    assert 0 < len(kept) < len(PROMPTS)
    with unfinished.open("a") as file:  # what a killed process leaves of its last line
        file.write('{"row": 9, "ans')
    monkeypatch.setattr(Engine, "complete", complete)

    other = generate(*how, "--max-new-tokens", 5)
    assert other.code == 2 and "other prompts or with other options" in other.err
    resumed = generate(*how)
    assert resumed.code == 0 and f"{len(kept)} of {len(PROMPTS)} answers are kept" in resumed.err
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not unfinished.exists()


def test_rows_without_a_prompt_are_listed_before_the_model_is_loaded(generate, prompts):
    bad = [{"prompt": ""}, {"text": "x"}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, 3]
    bad += [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [PROMPTS[0], *bad]))
    refused = generate("--model", "/no/such/model")
    assert refused.code == 2
    for words in (
        "line 2: has no `prompt`", "(its columns: `text`)", "line 4: has `prompt` and `messages`",
        "line 5: is the number 3", "line 6: `messages` does not end with a user turn",
    ):  # fmt: skip
        assert words in refused.err
    prompts.write_text("")
    assert "the file is empty" in generate().err


def test_options_that_do_not_go_together(cli, small_model, prompts, tmp_path):
    for words, message in (
        (("--prompts", prompts), "--prompts needs --output"),
        (("--prompt", "x", "--output", tmp_path / "o"), "--output needs --prompts"),
        (("--prompt", "x", "--prompts", prompts), "not allowed with"),
        (("--prompt", "x", "--min-p", 1), "--min-p is 1.0; expected 0 (off) or more, below 1"),
        (("--prompt", "x", "--top-k", -1), "--top-k is -1; expected 0 (off) or more"),
    ):
        refused = cli("generate", "--model", small_model, *words)
        assert refused.code == 2 and message in refused.err, refused.err


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": 5}, "`prompt` is the number 5; expected a text"),
        ({"prompt": "a", "answer": "gold"}, "has a column `answer`, which the output would replace"),
        ({"prompt": "a", "system": "Be brief."}, "has a column `system`, which is not used"),
    ],
)
def test_a_column_is_never_lost(generate, prompts, row, words):
    prompts.write_text(json.dumps(row) + "\n")
    refused = generate()
    assert refused.code == 2 and words in refused.err


def test_prompts_that_are_too_long_are_listed_before_the_first_answer(generate, prompts, tmp_path):
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Say 3.", "a " * 9000)))
    refused = generate()
    assert refused.code == 2 and "row 2: The prompt's" in refused.err
    prompts.write_text(json.dumps({"prompt": "Say 3."}) + "\n")
    assert generate().code == 0, "nothing of the refused run is in the way"
    assert not (tmp_path / "answers.jsonl.unfinished").exists()


def test_a_new_folder_and_text_that_utf8_cannot_hold(generate, prompts, tmp_path):
    prompts.write_text('{"prompt": "Say 3.", "id": "\\ud800"}\n')
    assert generate(output="new/answers.jsonl").code == 0
    (row,) = (tmp_path / "new" / "answers.jsonl").read_text().splitlines()
    assert json.loads(row)["id"] == "\ud800"


def test_a_place_that_cannot_be_written(generate, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused = generate(output="file/answers.jsonl")
    assert refused.code == 2 and "file" in refused.err and "Traceback" not in refused.err


@pytest.mark.parametrize("content", ['{"mine": 1}\n', "notes\n", ""])
def test_a_file_of_the_users_own_is_not_replaced(generate, tmp_path, content):
    (mine := tmp_path / "answers.jsonl.unfinished").write_text(content)
    refused = generate()
    assert refused.code == 2 and "answers.jsonl.unfinished" in refused.err
    assert mine.read_text() == content
    mine.unlink()
    mine.mkdir()
    assert generate().code == 2
