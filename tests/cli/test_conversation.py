"""A conversation that outgrows the context forgets its earliest exchanges, never the system turn."""

import io
import json
import sys

import pytest

from fettle.cli.conversation import chat
from fettle.engine.load import load
from fettle.engine.request import Sampling
from fettle.engine.text import Engine
from fettle.errors import UserError

SYSTEM = "Be brief, please."


@pytest.fixture(scope="module")
def loaded(small_model):
    return Engine(*load(small_model, device="cpu"))


@pytest.fixture
def rendered(monkeypatch):
    """The texts that were given to the model, whose answers are all `Here.`"""
    texts: list[str] = []

    def answer(self, turns, sampling):
        texts.append(self.text_of(turns))
        yield from ("He", "re.")

    monkeypatch.setattr(Engine, "stream", answer)
    return texts


def say(monkeypatch, loaded, lines: list[str], **options) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat(loaded, Sampling(max_new_tokens=100), **options)


def test_the_earliest_exchanges_are_forgotten(monkeypatch, loaded, rendered, capsys):
    lines = [f"Say {n}. " + "fox " * 12 for n in range(9)]
    say(monkeypatch, loaded, lines, system=SYSTEM)
    assert capsys.readouterr().out == "Here.\n" * 9
    tokenizer = loaded.tokenizer
    for n, text in enumerate(rendered):
        assert text.startswith(f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n")
        assert f"Say {n}." in text and text.endswith("<|end|>\n<|assistant|>\n")
        assert len(tokenizer(text)["input_ids"]) <= 156  # context less the room for an answer
        assert text.count("<|user|>") == text.count("<|assistant|>")
    assert "Say 0." in rendered[1] and "Here." in rendered[1]
    assert "Say 0." not in rendered[-1] and "Say 7." in rendered[-1]


def test_leaving_and_starting_over(monkeypatch, loaded, rendered):
    say(monkeypatch, loaded, ["Say 1.", "/new", "Say 2.", "/quit", "Say 3."])
    assert ["Say 1." in text for text in rendered] == [True, False]


def test_input_that_is_not_text(monkeypatch, loaded):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        chat(loaded, Sampling())


def test_a_message_that_is_too_long_does_not_end_the_chat(small_model, cli):
    lines = ["Say 1.", "fox " * 300, "Say 2."]
    words = ("chat", "--model", small_model, "--device", "cpu", "--max-new-tokens", 4, "--temperature", 0)
    ended = cli(*words, stdin="\n".join(lines) + "\n")
    alone = cli(*words, stdin=f"{lines[0]}\n{lines[2]}\n")
    assert ended.code == alone.code == 0, ended.err
    assert ended.out == alone.out  # the long one is not remembered
    assert ended.err.count("context of 256 tokens") == 1
    assert alone.err.count("context of 256 tokens") == 0


def test_commands_in_a_chat(monkeypatch, loaded, rendered, tmp_path, capsys):
    file = tmp_path / "talk.jsonl"
    lines = [
        "/save", f"/save {file}", "/system Be brief.", "Say 1.", "first line\\", "second line", f"/save {file}",
        f"/save {file}", "/reset", "Say 2.", "/system", "Say 3.", "/help",
    ]  # fmt: skip
    say(monkeypatch, loaded, lines, system=SYSTEM)
    messages = capsys.readouterr().err
    assert "/save needs a file name" in messages and "nothing to save" in messages
    assert f"saved {file}" in messages and "already exists" in messages
    assert json.loads(file.read_text())["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say 1."},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "first line\nsecond line"},
        {"role": "assistant", "content": "Here."},
    ]
    assert ["Be brief." in text for text in rendered] == [True, True, True, False]
    assert ["Say 1." in text for text in rendered] == [True, True, False, False]


def test_ctrl_c_stops_the_answer_only(monkeypatch, loaded, capsys):
    texts = []

    def answer(self, turns, sampling):
        texts.append(self.text_of(turns))
        yield "Half"
        if len(texts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", answer)
    lines = iter(["Say 1.", "Say 2."])

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    chat(loaded, Sampling(max_new_tokens=20))
    assert "Half<|end|>" in texts[1], "the next turn sees what was answered"
    assert capsys.readouterr().out == "Half\nHalf\n"
