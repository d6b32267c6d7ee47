"""`fettle data`: every part of what it shows is that of a file made to have it."""

import json

import pytest

import fettle
from fettle.checkpoints.locate import embedded_model
from fettle.models.load import load_tokenizer

STORY = (
    "the quick brown fox jumps over the lazy dog while seven wizards make toxic brew for the queen and jack"
)


def chat(question: str, answer: str, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


ROWS = [
    chat("Say 1.", "Here is 1!"),
    chat(f"Tell a story about {STORY}.", f"{STORY}. The end of the story, which was short."),
    chat("Say 1.", "Here is 1!"),
    chat(f"tell a story about {STORY}!", f"{STORY}. The end of the story, which was short"),
    chat("Broken?", "It\ufffds \ufffdbroken."),
    chat("Noise?", "#$%^&*()" * 20),
    chat("Again?", "The same line again.\n" * 6),
    chat(
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. How many?",
        "72",
    ),
    chat("Long?", "word " * 400),
    chat("Nothing?", " "),
]


@pytest.fixture
def write(tmp_path):
    def file(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return file


@pytest.fixture
def show(cli, small_model, write):
    def run(*words, rows=ROWS, code=0):
        ended = cli("data", write("chats.jsonl", rows), "--model", small_model, *words)
        assert ended.code == code, ended.err
        return ended

    return run


def test_each_part_is_shown(show) -> None:
    shown = show().out
    for line in (
        "10 rows (10 messages) became 9 examples",
        "1 row truncated to 256 tokens",
        "1 row dropped: 1 because the assistant's turn is empty",
        "maximum length 256: longer rows are cut or split",
        "3 rows with the mask: trained text between ⟦ and ⟧",
        "Say 1.",
        "⟦Here is 1!<|end|>⟧",
        "longest rows (9)\n  chats.jsonl, line 9:",
        "rows with replacement characters (U+FFFD): their encoding was broken (1)\n  chats.jsonl, line 5: 2 of them",
        "rows that are mostly neither letters nor digits (1)\n  chats.jsonl, line 6:",
        "rows that repeat a line (1)\n  chats.jsonl, line 7: 6 times 'The same line again.'",
        "identical rows\n  2 rows in 1 group\n  chats.jsonl, line 1; chats.jsonl, line 3\n",
        "nearly identical rows\n  2 rows in 1 group\n  chats.jsonl, line 2; chats.jsonl, line 4\n",
    ):
        assert line in shown
    assert "overlap" not in shown and "\x1b" not in shown


def test_colour_takes_the_place_of_marks(show, monkeypatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = show().out
    assert "trained text in green, the rest dim" in shown
    assert "\x1b[1;32mHere is 1!<|end|>" in shown and "⟦" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦Here is 1!<|end|>⟧" in show().out


def test_the_options_are_those_of_a_run(show, tmp_path) -> None:
    assert "1 row truncated" not in show("--max-length", 200, rows=ROWS[:8]).out
    assert "3 rows truncated to 100 tokens" in show("--max-length", 100, rows=ROWS[5:]).out
    assert "14 of them trained on (93%)" in show("--train-on", "all", rows=ROWS[:1]).out
    assert "USER: Say 1. ASSISTANT:⟦ Here is 1!<|endoftext|>⟧" in show("--chat-template", "vicuna").out
    assert "2 rows with the mask" in show("--rows", 2).out
    assert "with the mask" not in show("--rows", 0).out


def test_overlaps_with_held_out_rows_and_a_benchmark(show, write) -> None:
    held_out = [
        ROWS[0],
        chat(f"Tell a story about {STORY}?", f"{STORY}: the end of the story, which was short."),
        ROWS[8],
    ]
    held_out.append(chat("Quite another question, isn't it?", "Yes, quite another."))
    problem = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    benchmark = [
        {"question": problem, "answer": "72"},
        {"question": "A problem of its own?", "nested": [{"a": problem}]},
    ]
    benchmark.append({"question": "What is the capital of France, and how many people live there today?"})
    words = ("--eval-data", write("held.jsonl", held_out), "--benchmark", write("bench.jsonl", benchmark))
    shown = show(*words).out
    for line in (
        "overlap with the held-out rows\n  3 of 4 rows, with 3 rows of the data",
        "held.jsonl, line 1 and chats.jsonl, line 1: identical",
        "held.jsonl, line 2 and chats.jsonl, line 2: nearly the same",
        "overlap with the benchmark\n  2 of 3 rows, with 1 row of the data",
        "bench.jsonl, line 1 and chats.jsonl, line 8: 13 words: natalia sold clips to 48 of her friends",
    ):
        assert line in shown
    none = show("--benchmark", write("bench.jsonl", benchmark[2:])).out
    assert "overlap with the benchmark\n  none of 1 row" in none


def test_json_has_all_of_it(show, write) -> None:
    found = json.loads(show("--json", "--eval-data", write("held.jsonl", ROWS[:1])).out)
    assert found["rows"] == 10 and found["examples"] == 9 and found["max_length"] == 256
    assert sum(each["rows"] for each in found["histogram"]) == 9
    assert found["percentiles"]["100"] > 256
    assert found["shown"][0]["where"] == "chats.jsonl, line 1"
    assert {"text": "Here is 1!<|end|>", "is_trained": True} in found["shown"][0]["segments"]
    assert found["duplicates"] == [["chats.jsonl, line 1", "chats.jsonl, line 3"]]
    assert found["held_out"]["rows"] == ["chats.jsonl, line 1"] and found["benchmark"] is None
    assert found["dropped"] == [{"where": "chats.jsonl, line 10", "why": "the assistant's turn is empty"}]


def test_rows_behind_the_border_are_those_that_are_cut(show) -> None:
    found = json.loads(show("--json", "--max-length", 100).out)
    (border,) = (number for number, each in enumerate(found["histogram"]) if each["start"] == 101)
    assert sum(each["rows"] for each in found["histogram"][border:]) == found["cut"] > 1
    assert found["histogram"][border - 1]["end"] == 101


def test_bad_rows_stop_it_unless_they_are_skipped(show) -> None:
    rows = [*ROWS[:2], {"messages": [{"role": "user", "content": "No answer?"}]}, {"nothing": 1}]
    refused = show(rows=rows, code=2)
    assert "2 of 4 rows cannot be used" in refused.err and "--skip-bad-rows" in refused.err
    assert "2 bad rows skipped" in show("--skip-bad-rows", rows=rows).out
    tagged = [chat("Tagged?", "Yes.<|user|>No.")]  # the template refuses what the file's format allows
    refused = show(rows=tagged, code=2)
    assert "`<|user|>`" in refused.err and "--skip-bad-rows" in refused.err
    assert "Nothing is left to train on" in show("--skip-bad-rows", rows=tagged, code=2).err


PAIRS = [
    {"prompt": "Say 1.", "chosen": "Here is 1!", "rejected": "No."},
    {"prompt": f"Tell a story about {STORY}.", "chosen": f"{STORY}.", "rejected": "I cannot do that."},
    {"prompt": f"tell a story about {STORY}!", "chosen": f"{STORY}.", "rejected": "There is no story."},
]


def test_pairs_are_shown_by_their_sides(show, write) -> None:
    held_out = write("held_out.jsonl", PAIRS[:1])
    shown = show("--method", "dpo", "--rows", 2, "--eval-data", held_out, rows=PAIRS).out
    assert "became 3 pairs" in shown and "chats.jsonl, line 1 (chosen)" in shown
    assert "⟦Here is 1!<|end|>⟧" in shown
    assert "chats.jsonl, line 2; chats.jsonl, line 3" in shown  # nearly the same question and answer
    assert "identical" in shown.partition("overlap with the held-out rows")[2]


def test_labelled_answers_are_shown_with_their_labels(show) -> None:
    rows = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n > 0} for n, p in enumerate(PAIRS)]
    shown = show("--method", "kto", rows=rows).out
    assert "2 desirable answers and 1 undesirable" in shown and "chats.jsonl, line 1 (bad)" in shown


def test_rows_of_another_method_are_refused(show) -> None:
    assert "--method dpo" in show(rows=PAIRS, code=2).err
    assert "expected chosen and rejected" in show("--method", "orpo", code=2).err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "gone"), "no such folder: gone"),
        (("--max-length", 1000), "--max-length is 1000, but the model's context is 256"),
        (("--max-length", 1), "--max-length is 1; expected at least 2"),
        (("--rows", -1), "--rows is -1; expected 0 or more"),
        (("--chat-template", "chatlm"), "--chat-template 'chatlm' is not known; expected alpaca"),
        (("--eval-data", "gone.jsonl"), "gone.jsonl: no such file"),
        (("--benchmark", "gone.jsonl"), "gone.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_sentence(show, words, says) -> None:
    assert says in show(*words, code=2).err


def test_a_benchmark_that_is_damaged(show, tmp_path) -> None:
    (tmp_path / "bench.jsonl").write_text('{"a": 1}\n{"a": \n')
    refused = show("--benchmark", tmp_path / "bench.jsonl", code=2)
    assert "--benchmark" in refused.err and "line 2" in refused.err and "malformed JSON" in refused.err


def test_the_model_is_required(cli, write) -> None:
    refused = cli("data", write("chats.jsonl", ROWS))
    assert refused.code == 2 and "--model" in refused.err


def test_python_returns_what_the_command_shows(write) -> None:
    report = fettle.inspect_data(
        write("a.jsonl", ROWS[:4]), load_tokenizer(embedded_model()), max_length=512, rows=1
    )
    assert isinstance(report, fettle.DataReport)
    assert report.summary.rows == 4
    assert report.near_duplicates == (("a.jsonl, line 2", "a.jsonl, line 4"),)
    assert [row.where for row in report.shown] == ["a.jsonl, line 1"]


def test_a_folder_without_weights_is_enough(cli, small_model, write, tmp_path) -> None:
    for file in small_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    assert cli("data", write("chats.jsonl", ROWS), "--model", tmp_path / "model").code == 0


def test_real_rows_and_a_real_benchmark(cli, small_model, shared_data) -> None:
    words = ("--benchmark", shared_data / "eval" / "piqa" / "validation.jsonl", "--skip-bad-rows")
    ended = cli("data", shared_data / "train" / "alpaca_en_demo.json", "--model", small_model, *words)
    assert ended.code == 0, ended.err
    assert "overlap with the benchmark" in ended.out


def test_an_option_of_another_method_is_refused(show) -> None:
    refused = show("--method", "dpo", "--train-on", "all", rows=PAIRS, code=2)
    assert "--train-on belongs to --method sft, but the method is dpo; leave it out." in refused.err
