"""Errors name options as the face that shows them does."""

import ast
import pickle
import re
from pathlib import Path

from fettle.errors import UserError, option, reason_of
from fettle.options import flag

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fettle"
FAULT = UserError(f"{option('max_length')} is 9; expected at most {option('context')}.")


def test_each_face_words_the_options() -> None:
    assert str(FAULT) == "max_length is 9; expected at most context."
    assert FAULT.worded(flag) == "--max-length is 9; expected at most --context."
    assert (
        FAULT.worded(lambda name: f"<b>{name}</b>")
        == "<b>max_length</b> is 9; expected at most <b>context</b>."
    )


def test_the_reason_of_another_error_keeps_its_options() -> None:
    outer = UserError(f"rows.jsonl: {reason_of(FAULT)}")
    assert outer.worded(flag) == "rows.jsonl: --max-length is 9; expected at most --context."
    assert pickle.loads(pickle.dumps(outer)).worded(flag) == outer.worded(flag)


def test_text_that_only_looks_like_an_option_stays() -> None:
    assert UserError("row 3: max_length `data` --to").worded(flag) == "row 3: max_length `data` --to"


def test_no_message_outside_the_command_line_names_its_options() -> None:
    """Commands that the user can run are written out."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_error = isinstance(node, ast.Call) and ast.unparse(node.func) in ("UserError", "ModelFault")
            text = ast.unparse(node) if is_error and "cli" not in file.relative_to(SOURCE).parts else ""
            if re.search(r"[^\w-]--[a-z]", re.sub(r"(fettle \w+|pip install|llama-server) .*", "", text)):
                found.append(f"{file}: {text}")
    assert not found
