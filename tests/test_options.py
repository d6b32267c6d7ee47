"""Options: the command line, the YAML file and the dataclass must agree, and mistakes must be named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from fettle.errors import UserError
from fettle.options import Parser, add_options, read, resolve, write


@dataclass(kw_only=True, slots=True)
class Run:
    model: str = field(metadata={"help": "checkpoint folder or hub name"})
    data: list[str] = field(metadata={"help": "files to learn from"})
    rank: int = field(default=16, metadata={"help": "width of the adapters"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak rate"})
    packing: bool = field(default=True, metadata={"help": "100% full rows"})
    schedule: Literal["cosine", "linear"] = field(default="cosine", metadata={"help": "shape of the rate"})
    max_steps: int | None = field(default=None, metadata={"help": "stop early"})
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "modules"})
    note: str | None = None


def type_line(line: str, options: type = Run) -> dict:
    parser = Parser(prog="fettle train")
    add_options(parser, options)
    return vars(parser.parse_args(line.split()))


def from_yaml(folder: Path, text: str | bytes, typed: dict | None = None) -> Run:
    file = folder / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve(Run, typed or {}, file)


GIVEN = "model: m\ndata: [a.jsonl]\n"


def test_only_typed_options_are_in_the_namespace():
    assert type_line("--model m --no-packing") == {"model": "m", "packing": False}


def test_every_type_is_read_from_the_line():
    typed = type_line(
        "--model m --data a.jsonl b.jsonl --data c.jsonl --rank 8 --learning-rate 1e-5 --no-packing"
        " --schedule linear --max-steps 3 --targets o_proj"
    )
    assert resolve(Run, typed, None) == Run(
        model="m",
        data=["a.jsonl", "b.jsonl", "c.jsonl"],
        rank=8,
        learning_rate=1e-5,
        packing=False,
        schedule="linear",
        max_steps=3,
        targets=["o_proj"],
    )


def test_help_shows_texts_defaults_and_needs(capsys):
    with pytest.raises(SystemExit) as stop:
        type_line("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "checkpoint folder or hub name (required)" in shown
    assert "width of the adapters (default: 16)" in shown
    assert "100% full rows (default: on)" in shown
    assert "modules (default: q_proj v_proj)" in shown
    assert "--packing, --no-packing" in shown
    assert "{cosine,linear}" in shown


def test_line_wins_over_file_wins_over_default(tmp_path):
    run = from_yaml(tmp_path, GIVEN + "rank: 8\nlearning_rate: 1e-3\n", type_line("--rank 4"))
    assert (run.rank, run.learning_rate, run.schedule) == (4, 1e-3, "cosine")


def test_names_in_the_namespace_that_are_no_options_are_ignored(tmp_path):
    typed = {"command": "train", "config": tmp_path, "model": "m", "data": ["d"]}
    assert resolve(Run, typed, None).model == "m"


@pytest.mark.parametrize("written", ["2e-4", "2.0e-4", "0.0002", "'2e-4'", "2E-4"])
def test_a_number_in_any_spelling_is_a_number(tmp_path, written):
    assert from_yaml(tmp_path, GIVEN + f"learning_rate: {written}").learning_rate == 2e-4


def test_a_whole_number_is_a_float_where_one_is_expected(tmp_path):
    rate = from_yaml(tmp_path, GIVEN + "learning_rate: 1").learning_rate
    assert rate == 1.0 and isinstance(rate, float)


def test_text_is_not_turned_into_booleans_dates_or_numbers(tmp_path):
    run = from_yaml(tmp_path, "model: 2024-01-01\ndata: [no, 1.50, 'null']\nnote: on")
    assert (run.model, run.data, run.note) == ("2024-01-01", ["no", "1.50", "null"], "on")


def test_one_text_stands_for_a_list_of_one_and_dashes_for_underscores(tmp_path):
    run = from_yaml(tmp_path, "model: m\ndata: ../a b.jsonl\nlearning-rate: 0.5")
    assert (run.data, run.learning_rate) == (["../a b.jsonl"], 0.5)


@pytest.mark.parametrize("nothing", ["", "~", "null"])
def test_nothing_is_none_where_allowed(tmp_path, nothing):
    run = from_yaml(tmp_path, GIVEN + f"max_steps: {nothing}\nnote: 'null'")
    assert (run.max_steps, run.note) == (None, "null")


@pytest.mark.parametrize(
    "run",
    [
        Run(model="m", data=["d"]),
        Run(
            model="~/a: b #c",
            data=["null", "", "3", "- x", "{{", "yes"],
            rank=-1,
            learning_rate=1e-300,
            packing=False,
            schedule="linear",
            max_steps=10**12,
            targets=[],
            note="two\nlines\t'quoted' \"twice\" é 漢 🙂 \u2028 end \udc80",
        ),
        Run(model=" spaces ", data=["d"], learning_rate=1e22, note=""),
    ],
)
def test_what_is_written_is_read_back_equal(tmp_path, run):
    write(run, tmp_path / "run.yaml", comment="fettle train\nagain")
    assert read(Run, tmp_path / "run.yaml") == run
    assert (tmp_path / "run.yaml").read_text().startswith("# fettle train\n# again\nmodel:")
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


def test_the_written_file_is_complete(tmp_path):
    write(Run(model="m", data=["d"]), tmp_path / "run.yaml")
    assert list(yaml.safe_load((tmp_path / "run.yaml").read_text())) == list(Run.__dataclass_fields__)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text("old")
    monkeypatch.setattr(yaml, "safe_dump", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(Run(model="m", data=["d"]), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("run.yaml", "old")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GIVEN + "rnak: 8", ["run.yaml, line 3", "'rnak'", "did you mean rank?"]),
        (GIVEN + "zzz: 8", ["line 3", "unknown option 'zzz'"]),
        (GIVEN + "rank: abc", ["line 3", "rank", "expected a whole number", "found 'abc'"]),
        (GIVEN + "rank: 8.5", ["expected a whole number", "found '8.5'"]),
        (GIVEN + "rank:", ["expected a whole number", "found nothing"]),
        (GIVEN + "rank: [1]", ["expected a whole number", "found a list"]),
        (GIVEN + "rank: true", ["expected a whole number", "found 'true'"]),
        (GIVEN + "note: {a: b}", ["expected text", "found a mapping"]),
        (GIVEN + "learning_rate: fast", ["expected a number", "found 'fast'"]),
        (GIVEN + "learning_rate: nan", ["expected a number", "found 'nan'"]),
        (GIVEN + "packing: 2", ["expected true or false", "found '2'"]),
        (GIVEN + "schedule: cosin", ["expected cosine or linear", "found 'cosin'", "did you mean cosine?"]),
        (GIVEN + "targets: {a: b}", ["expected a list of text values", "found a mapping"]),
        (GIVEN + "targets: [[a]]", ["expected a list of text values"]),
        (GIVEN + "rank: 1\nrank: 2", ["line 4", "'rank'", "set twice"]),
        (GIVEN + "? [a]\n: b", ["line 3", "unknown option a list"]),
        ("model: m\n", ["data is required"]),
        ("rank: 1\n", ["model and data are required"]),
        ("- a\n- b\n", ["line 1", "found a list", "rank: 16"]),
        ("hello", ["found 'hello'"]),
        ("", ["contains no options"]),
        ("# rank: 8\n", ["contains no options"]),
        ("model: m\ndata: [a\nrank: 8\n", ["line 3", "not valid YAML"]),
        ("model: m\n\tdata: a\n", ["line 2", "not valid YAML"]),
        ("model: m\n---\nmodel: n\n", ["line 2", "not valid YAML"]),
        (b"model: \xff\xfe\n", ["not a text file"]),
        (b"model: \x00\x01\n", ["not a text file"]),
        ("[" * 100_000, ["too deeply nested"]),
        ("rank: 4\n" * 200_000, ["too long"]),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        from_yaml(tmp_path, text)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_tag_runs_no_code(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(UserError, match="expected text, found a list"):
        from_yaml(tmp_path, GIVEN + f"note: !!python/object/apply:os.mkdir ['{marker}']")
    assert not marker.exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml: No such file"):
        resolve(Run, {}, tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        resolve(Run, {}, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 1.5),
        ("rank", True),
        ("model", 3),
        ("packing", 1),
        ("targets", ["a", 1]),
        ("model", None),
        ("schedule", "x"),
    ],
)
def test_values_given_from_python_are_checked_too(name, value):
    with pytest.raises(UserError, match=f"^{name}: expected"):
        resolve(Run, {"model": "m", "data": ["d"], name: value}, None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--rnak 8", ["unknown option --rnak", "did you mean --rank?", "fettle train --help"]),
        ("--rnak=8", ["unknown option --rnak (did you mean --rank?)"]),
        ("--no-paking", ["did you mean --no-packing?"]),
        ("--learning 3", ["unknown option --learning"]),
        ("--rank abc", ["--rank", "expected a whole number", "found 'abc'"]),
        ("--rank", ["--rank", "expected one argument"]),
        ("--learning-rate inf", ["expected a number", "found 'inf'"]),
        ("--schedule cosin", ["expected cosine or linear", "did you mean cosine?"]),
        ("word", ["unexpected 'word'"]),
    ],
)
def test_mistakes_on_the_line_are_one_sentence_and_exit_code_2(capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        type_line(line)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("fettle: error: ") and message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian --rank 3", ["'trian'", "did you mean train?"]),
        ("train --rnak 3", ["did you mean --rank?", "fettle train --help"]),
        ("chat --rank 3", ["unknown option --rank", "fettle chat --help"]),
    ],
)
def test_a_command_answers_for_its_own_options(capsys, line, words):
    parser = Parser(prog="fettle")
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(commands.add_parser("train"), Run)
    commands.add_parser("chat")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(line.split())
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(word in message for word in words), message
