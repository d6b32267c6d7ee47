"""A conversation that outgrows the context forgets its earliest exchanges, never the system turn."""

import io
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
