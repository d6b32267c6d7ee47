"""`fettle quickstart`: fine-tune, export and test the embedded model; also a tour of the Python API.

The embedded model has a few small skills (spelling, counting, sorting, finding a word in a sentence) but has never
seen an order turned into JSON. It learns that in a few minutes on a laptop; the report shows the gain on held-out
orders and how much of the old skills is left.
"""

import dataclasses
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from fettle.checkpoints.locate import EMBEDDED
from fettle.engine.load import load
from fettle.engine.text import generate
from fettle.events import Message, Report, ignore
from fettle.export.checkpoint import export_safetensors
from fettle.export.gguf import export_gguf
from fettle.files import require_new_folder, shell_path
from fettle.methods.finetune import train
from fettle.runs.options import TrainOptions
from fettle.runs.outcome import Outcome
from fettle.runs.resume import REPORT
from fettle.tiny.lessons import lessons, orders

ORDER = "Order: 7 red hats for Ana, to be paid by card."
ORDERS, REHEARSED, ASKED = 1550, 1200, 80
"""Rows of the new skill; rows of old skills mixed in, so that they are not forgotten; questions of each kind."""


def quickstart(output: Path, *, report: Report = ignore) -> Outcome:
    """Teach the embedded model to turn an order into JSON; write data, adapter, merged model, GGUF and report."""
    output = output.expanduser()
    require_new_folder(output, "the quickstart")
    report(Message("Teaching fettle-tiny to turn an order into JSON.\n"))
    data = output / "data"
    rehearsed = lessons(REHEARSED, seed=1, split="train")
    _write(data / "train.jsonl", _shuffled(chain(orders(ORDERS, seed=1, split="train"), rehearsed)))
    _write(data / "held_out.jsonl", orders(ASKED, seed=3, split="held_out"))
    _write(data / "old_skills.jsonl", lessons(ASKED, seed=3, split="held_out"))
    outcome = train(
        TrainOptions(
            model=EMBEDDED,
            data=str(data / "train.jsonl"),
            eval_data=str(data / "held_out.jsonl"),
            keep_data=str(data / "old_skills.jsonl"),
            output=str(output / "model"),
            max_length=1024,  # tokens per step: small, so that one epoch has enough steps
            epochs=1.0,
            learning_rate=1.5e-3,
            eval_steps=100,
            samples=ASKED,
        ),
        report=report,
    )
    report(Message("merging the adapter and verifying the merged model"))
    merged = export_safetensors(outcome.output, output / "merged")
    report(Message("exporting to GGUF and running it in llama.cpp:"))
    (file,) = export_gguf(
        outcome.output, output / "model.gguf", quantizations=["q8_0"], ollama=True, report=report
    )
    model, tokenizer = load(file)
    report(Message(f"> {ORDER}\n{generate(model, tokenizer, ORDER)}\n"))
    return _with_next_steps(outcome, merged, file)


def _with_next_steps(outcome: Outcome, merged: Path, gguf: Path) -> Outcome:
    """The same outcome, with the exported files and next commands for the user's own data."""
    files = [
        ("adapter", str(outcome.output)),
        ("merged", str(merged)),
        ("GGUF", str(gguf)),
        ("report", str(outcome.output / REPORT)),
    ]
    adapter, folder, file = map(shell_path, (outcome.output, merged, gguf))
    commands = [
        f'fettle generate --model {adapter} --prompt "{ORDER}"',
        f"fettle compare {folder} {file} --data {shell_path(merged.parent / 'data' / 'held_out.jsonl')}",
        f"fettle chat --model {folder}",
        f"fettle train --model {EMBEDDED} --data my_chats.jsonl --output my-model",
        "fettle train --model microsoft/Phi-3.5-mini-instruct --data my_chats.jsonl --output my-model",
    ]
    report = dataclasses.replace(outcome.report, files=files, next_commands=commands)
    return dataclasses.replace(outcome, report=report)


def _shuffled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    shuffled = list(rows)
    Random(1).shuffle(shuffled)
    return shuffled


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n")
