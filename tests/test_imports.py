"""What a command imports, and that it opens no connection: each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def imported(code: str) -> set[str]:
    """The top-level modules that are loaded after `code`."""
    words = (
        f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    )
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import fettle", "import fettle.cli"])
def test_help_is_shown_without_heavy_libraries(code: str) -> None:
    assert imported(code).isdisjoint({"torch", "transformers", "peft", "trl", "datasets", "rich", "psutil"})


ALONE = """
import socket, sys

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise AssertionError(f"a connection to {address}")

socket.socket.connect = socket.socket.connect_ex = refuse
from fettle.cli import main
import fettle.methods.pretrain
code = 0
for words in sys.argv[1:]:
    code = code or main(words.split())
print("of other formats:", sorted({"gguf", "xllamacpp", "compressed_tensors"} & set(sys.modules)))
sys.exit(code)
"""


def test_nothing_connects_to_the_network_or_needs_the_libraries_of_other_formats(tmp_path: Path) -> None:
    """A GPU machine may have neither."""
    rows = [{"prompt": "Spell cat.", "completion": f"c, a, t {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = "train --model fettle-tiny --data rows.jsonl --output out --max-steps 1 --samples 1 --device cpu"
    generate = "generate --model out --prompt x --max-new-tokens 2 --device cpu"
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, train, generate],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert ended.stdout.endswith("of other formats: []\n")
