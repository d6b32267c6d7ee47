"""Broken input for every reader: it works or is refused in one sentence, soon. `benchmarks/fuzz.py` runs more."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from hostile import READERS, outcome

sys.path.pop(0)

FAST = {"data rows, jsonl", "data rows, json", "data rows, csv", "data rows, parquet", "data rows, txt"}
FAST |= {"run.yaml", "options", "facts.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("name", [name for name in READERS if name != "GGUF"])
def test_broken_input_works_or_is_refused(name) -> None:
    reader = READERS[name]

    @settings(
        max_examples=200 if name in FAST else 15,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs())
    def check(content) -> None:
        outcome(reader, content)

    check()
