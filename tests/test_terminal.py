"""What is printed cannot control a terminal: escape codes in rows, names, answers and errors are shown as symbols."""

import ast
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from fettle import cli, terminal

TITLE, CLEAR, CLIPBOARD = "\x1b]0;owned\x07", "\x1b[2J", "\x1b]52;c;aGk=\x07"
HOSTILE = f"a{TITLE}b{CLEAR}c{CLIPBOARD}d\x9b31me\x7f\x00\u202ef"
CONTROLS = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\u202e"} - {"\n", "\t"}
SOURCE = Path(cli.__file__).parent


def test_control_characters_become_visible_and_text_stays() -> None:
    shown = terminal.visible(HOSTILE)
    assert not CONTROLS & set(shown)
    assert "␛]0;owned␇b␛[2J" in shown and "␡␀" in shown
    text = "Größe 漢字 👩‍💻\tשלום\nzwei\r\n"
    assert terminal.visible(text) == text.replace("\r", "")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_console_sends_only_its_own_codes(monkeypatch, is_terminal) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    console = terminal.console()
    table = Table(HOSTILE)
    table.add_row(HOSTILE, style="bold")
    for printed in (HOSTILE, table):
        console.print(printed, style="bold")
    shown = sys.stdout.getvalue()
    for ours in ("\x1b[1m", "\x1b[0m"):
        assert (ours in shown) is is_terminal
        shown = shown.replace(ours, "")
    assert not CONTROLS & set(shown)


def test_a_notebook_gets_plain_lines(monkeypatch) -> None:
    """In one stream: neither an output per line, as rich would make, nor the colours of ipykernel's FORCE_COLOR."""

    class Stream(io.StringIO):
        __module__ = "ipykernel.iostream"

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Stream())
    console = terminal.console()
    console.print("one", style="bold")
    console.print("two")
    assert sys.stdout.getvalue() == "one\ntwo\n"
    assert not console.is_terminal and not console.is_jupyter


def test_no_text_is_read_as_markup() -> None:
    console = terminal.console()
    console.file = io.StringIO()
    table = Table("name")
    table.add_row("[link=file:///etc/passwd]here[/link] [red]x[/] [/] :smile:")
    console.print(table)
    console.print("[bold]x[/bold] [/] :smile:")
    assert "[red]x[/] [/] :smile:" in console.file.getvalue()
    assert "[bold]x[/bold] [/] :smile:" in console.file.getvalue()


def test_only_this_module_prints() -> None:
    """The embedded model's own tools aside, which print what they made themselves."""
    for file in SOURCE.rglob("*.py"):
        if file.name == "terminal.py" or "tiny" in file.parts:
            continue
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not {"print", "Console"} & {call.id for call in calls if isinstance(call, ast.Name)}, file


def test_an_error_about_a_hostile_name(capsys, tmp_path) -> None:
    assert cli.main(["generate", "--model", str(tmp_path / f"m{CLEAR}"), "--prompt", "x"]) == 2
    said = capsys.readouterr().err
    assert "␛[2J" in said and "\x1b" not in said
    with pytest.raises(SystemExit):
        cli.main([f"gen{TITLE}erate"])
    assert "\x1b" not in capsys.readouterr().err


def test_an_answer_is_data_in_a_pipe_and_clean_on_a_terminal(capsys, monkeypatch) -> None:
    terminal.print_result(HOSTILE)
    assert capsys.readouterr().out == HOSTILE + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal.print_result(HOSTILE)
    assert "\x1b" not in capsys.readouterr().out


def test_a_real_terminal(tmp_path) -> None:
    """Nothing but the process's own styles reaches a pseudo-terminal."""
    ours, theirs = pty.openpty()
    code = f"from fettle import terminal; terminal.print_result({HOSTILE!r}); terminal.print_message({HOSTILE!r})"
    subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10000).decode()
    os.close(ours)
    assert not (CONTROLS - {"\r"}) & set(shown) and shown.count("owned") == 2


def test_a_letter_that_the_encoding_lacks_is_no_traceback(tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "x"}))
    found = subprocess.run(
        [sys.executable, "-m", "fettle", "train", "--resume", "--output", str(tmp_path / "漢字")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert found.returncode == 2 and b"Traceback" not in found.stderr
