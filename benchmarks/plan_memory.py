"""Peak memory of small, wide and odd models on a CPU: what `fettle train` promises, and what its process takes.

    python benchmarks/plan_memory.py [--only gemma] [--out benchmarks/results/plan_memory.json]

Each case is a model with random weights and a tokenizer of its own, trained for a few steps by `fettle train` in a
process of its own. Its memory is watched from outside over the whole life of the process: imports, reading, planning,
loading, scores and answers before and after, evaluation, saving.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fresh
import torch
from machine import circumstances
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES
from fettle.runs.method_facts import METHOD_FACTS
from fettle.tiny.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, ROLES

OUT = Path(__file__).parent / "results" / "plan_memory.json"
FETTLE = (sys.executable, "-c", "import sys; from fettle.cli import main; sys.exit(main())")
POLL_SECONDS = 0.01
ALLOWED = (-0.05, 0.10)
"""How far a prediction may be below and above what is measured."""
NOT_PLANNED = ("--eval-fraction", "--eval-steps", "--save-steps", "--samples")
"""Options of `fettle train` that `fettle plan` does not have. Each takes a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Chats: how many, and words (about a token each) of each question and answer."""

    count: int = 48
    question: int = 24
    answer: int = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """config: of the model, None for the embedded one. options: of `fettle train`. is_resumed: killed after its first
    checkpoint."""

    name: str
    config: dict[str, Any] | None = None
    rows: Rows = Rows()
    dtype: torch.dtype = torch.bfloat16
    options: tuple[str, ...] = ()
    has_kept_rows: bool = False
    is_resumed: bool = False

    @property
    def method(self) -> Any:
        return dict(itertools.pairwise(self.options)).get("--method", "sft")


def llama(hidden: int, layers: int, heads: int, vocabulary: int = 32_000, **more: Any) -> dict[str, Any]:
    """A config in Llama's proportions."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    } | more


PHI_50M = llama(384, 12, 6, 32_064, model_type="phi3", intermediate_size=1024)
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 32,
    "long_factor": [4.0] * 32,
}
CAPPED = {"model_type": "gemma2", "head_dim": 64, "tie_word_embeddings": True}
LONG = Rows(count=10, question=20, answer=1500)
NONE_HELD_OUT = ("--eval-fraction", "0")
HELD_OUT = ("--eval-fraction", "0.2", "--samples", "1")

CASES = (
    Case(name="embedded", options=HELD_OUT),
    Case(name="embedded, kept rows, 64 samples", options=(*HELD_OUT, "--samples", "64"), has_kept_rows=True),
    Case(name="embedded, nothing held out", options=NONE_HELD_OUT, rows=LONG),
    Case(name="phi 50M", config=PHI_50M, options=HELD_OUT),
    Case(
        name="phi 50M, long rows, no samples",
        config=PHI_50M,
        rows=LONG,
        options=(*HELD_OUT, "--samples", "0"),
    ),
    Case(name="phi 50M, fp32", config=PHI_50M, rows=LONG, dtype=torch.float32, options=HELD_OUT),
    Case(
        name="phi, LongRoPE",
        config=PHI_50M | {"original_max_position_embeddings": 1024, "rope_scaling": LONG_ROPE},
        rows=LONG,
        options=HELD_OUT,
    ),
    Case(name="gemma 256k, 2 layers", config=llama(64, 2, 4, 256_000, **CAPPED), rows=LONG, options=HELD_OUT),
    Case(name="gemma 256k, wide", config=llama(512, 4, 8, 256_000, **CAPPED), options=HELD_OUT),
    Case(
        name="qwen3 150k, tied",
        config=llama(384, 8, 6, 150_000, model_type="qwen3", head_dim=64, tie_word_embeddings=True),
        rows=LONG,
        options=NONE_HELD_OUT,
    ),
    Case(name="llama 128k, untied", config=llama(256, 6, 4, 128_000), rows=LONG, options=HELD_OUT),
    Case(name="deep and narrow", config=llama(128, 48, 4), rows=LONG, options=HELD_OUT),
    Case(name="wide and shallow", config=llama(2048, 1, 16), options=HELD_OUT),
    Case(
        name="wide and shallow, NF4",
        config=llama(2048, 2, 16),
        rows=LONG,
        options=(*HELD_OUT, "--quantization", "nf4"),
    ),
    Case(
        name="grouped queries, NF4",
        config=llama(768, 12, 12, num_key_value_heads=2),
        rows=LONG,
        options=(*HELD_OUT, "--quantization", "nf4", "--samples", "0"),
    ),
    Case(
        name="llama 150M",
        config=llama(768, 14, 12, num_key_value_heads=4),
        rows=LONG,
        options=(*HELD_OUT, "--rank", "4"),
    ),
    Case(name="rank 128", config=llama(512, 10, 8), options=(*HELD_OUT, "--rank", "128")),
    Case(
        name="two rows a batch, accumulated",
        config=llama(512, 8, 8, num_key_value_heads=2),
        rows=LONG,
        options=(*HELD_OUT, "--batch-size", "2", "--gradient-accumulation-steps", "2"),
    ),
    Case(
        name="leanest layers",
        config=llama(256, 12, 8, intermediate_size=1024),
        rows=LONG,
        options=(*HELD_OUT, "--gradient-checkpointing", "--samples", "0"),
    ),
    Case(
        name="within a budget",
        config=llama(256, 12, 8, intermediate_size=1024),
        rows=LONG,
        options=(*NONE_HELD_OUT, "--memory", "1100MB"),
    ),
    Case(
        name="resumed",
        config=llama(256, 12, 8, intermediate_size=1024),
        rows=LONG,
        options=(*HELD_OUT, "--save-steps", "1"),
        is_resumed=True,
    ),
    Case(
        name="pairs",
        config=llama(512, 10, 8, num_key_value_heads=4),
        rows=LONG,
        options=(*HELD_OUT, "--method", "dpo", "--batch-size", "2"),
    ),
    Case(
        name="labelled answers, NF4",
        config=llama(768, 12, 12, num_key_value_heads=2),
        options=(*HELD_OUT, "--method", "kto", "--quantization", "nf4"),
    ),
    Case(name="many rows", config=llama(256, 4, 4), rows=Rows(count=6_000), options=("--eval-steps", "1000")),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="cases whose name contains this; the file keeps its other rows"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--timeline", action="store_true", help="print memory next to what the run prints")
    options = parser.parse_args()
    content: dict[str, Any] = {"kind": "plan memory"} | circumstances() | {"rows": []}
    if options.only and options.out.exists():  # the other cases stay in the file
        content["rows"] = json.loads(options.out.read_text())["rows"]
    for case in (case for case in CASES if options.only in case.name):
        with tempfile.TemporaryDirectory() as folder:
            row = measure(case, Path(folder), has_timeline=options.timeline)
        others = [each for each in content["rows"] if each["case"] != case.name]
        content["rows"] = [*others, row]
        print(line_of(row), flush=True)
        fresh.write(options.out, content)


def measure(case: Case, folder: Path, *, has_timeline: bool) -> dict[str, Any]:
    """Train in a process of its own, ask `fettle plan` for the same, and put the figures side by side."""
    model = "fettle-tiny" if case.config is None else str(write_model(case, folder / "model"))
    write_rows(case.rows, folder / "rows.jsonl", METHOD_FACTS[case.method].rows)
    words = ["train", "--model", model, "--data", str(folder / "rows.jsonl"), "--output", str(folder / "out")]
    words += ["--max-steps", "2", "--device", "cpu", *case.options]
    if case.has_kept_rows:
        write_rows(case.rows, folder / "kept.jsonl")
        words += ["--keep-data", str(folder / "kept.jsonl")]
    mark = folder / "out" / "checkpoints" / "checkpoint-1" / "complete"
    text, peak = watch(words, mark.exists if case.is_resumed else None, has_timeline=has_timeline)
    if case.is_resumed:
        text, peak = watch(
            ["train", "--resume", "--output", str(folder / "out")], None, has_timeline=has_timeline
        )
    predicted = re.search(r"^ *peak +([\d.,]+ .B)", text, re.MULTILINE)
    tokens = re.search(r"per step of ([\d,]+) tokens", text)
    layers = re.search(r"layers: (.*)", text)
    if predicted is None or tokens is None or layers is None:
        raise SystemExit(f"{case.name}: {text[-2000:]}")
    step_tokens = int(tokens[1].replace(",", ""))
    return {
        "case": case.name,
        "tokens": step_tokens,
        "layers": layers[1],
        "plan_command_peak_bytes": asked_of_plan(model, case.options, step_tokens),
        "predicted_peak_bytes": bytes_of(predicted[1]),
        "peak_bytes": peak,
    }


def asked_of_plan(model: str, options: tuple[str, ...], step_tokens: int) -> int:
    """The peak that `fettle plan` states for rows as long as the run's longest."""
    pairs = dict(itertools.pairwise(options))
    facts = METHOD_FACTS[pairs.get("--method", "sft")]  # type: ignore[index]
    rows = int(pairs.get("--batch-size", facts.batch_size)) * facts.answers
    rows *= int(pairs.get("--gradient-accumulation-steps", 1))
    left_out = {i + n for i, word in enumerate(options) if word in NOT_PLANNED for n in (0, 1)}
    words = [word for i, word in enumerate(options) if i not in left_out]
    context = str(step_tokens // rows)
    text = subprocess.run(
        [*FETTLE, "plan", "--model", model, "--device", "cpu", "--json", "--context", context, *words],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return int(json.loads(text)["peak_bytes"])


def watch(words: list[str], is_enough: Callable[[], bool] | None, *, has_timeline: bool) -> tuple[str, int]:
    """What `fettle` printed, and the most memory that its process ever had; it is killed when `is_enough`."""
    command = [*FETTLE, *words]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak, seen, began = 0, 0, time.monotonic()
        while process.poll() is None:
            status = status_of(process.pid)
            peak = max(peak, status.get("VmHWM", 0))
            if has_timeline and (size := os.fstat(output.fileno()).st_size) > seen:
                piece = os.pread(output.fileno(), size - seen, seen).decode(errors="replace")
                figures = " ".join(
                    f"{n}={status.get(n, 0) / 1e6:.0f}" for n in ("VmHWM", "RssAnon", "RssFile")
                )
                print(
                    f"    {time.monotonic() - began:5.1f} s {figures} | {piece.strip()[-110:]!r}", flush=True
                )
                seen = size
            if is_enough is not None and is_enough():
                process.send_signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        output.seek(0)
        text = output.read()
    if process.returncode and is_enough is None:
        raise fresh.Failed(text[-1500:])
    return text, peak


def status_of(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes. A run resets its own VmHWM between phases, so it must be polled."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def bytes_of(text: str) -> int:
    """The bytes that fettle printed as, say, "1.43 GB"."""
    number, unit = text.split()
    return int(float(number.replace(",", "")) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit])


def write_model(case: Case, folder: Path) -> Path:
    """A checkpoint of random weights, with a tokenizer of as many tokens as the config says."""
    assert case.config is not None
    values = dict(case.config)
    config: PreTrainedConfig = FAMILIES[values.pop("model_type")].config(
        **values, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = causal_lm_class(config.model_type)(config).to(case.dtype)
    model.save_pretrained(folder)
    write_tokenizer(config.vocab_size, folder)
    return folder


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Byte-level BPE with a token for every word of up to three letters, and for as many of four as there is room."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    letters = string.ascii_lowercase
    special = [END_OF_TEXT, END_OF_TURN, *(f"<|{role}|>" for role in ROLES)]
    longer = itertools.chain.from_iterable(itertools.product(letters, repeat=n) for n in (2, 3, 4))
    for word in itertools.islice(map("".join, longer), vocabulary - len(tokens) - len(special)):
        tokens.append(word)
        merges.append((word[:-1], word[-1]))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_rows(rows: Rows, file: Path, kind: str = "rows") -> None:
    """Chats of random words, pairs of answers or labelled ones; a third of the answers are short, as in real data."""
    chosen = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(chosen.choices(string.ascii_lowercase, k=3)) for _ in range(count))

    with open(file, "w") as stream:
        for number in range(rows.count):
            length = rows.answer // (2 if rows.count < 100 else 1 + 4 * (number % 3 == 0))
            question, answer = words(rows.question), words(length)
            if kind == "pairs":
                row: dict[str, Any] = {"prompt": question, "chosen": answer, "rejected": words(length)}
            elif kind == "labelled":
                row = {"prompt": question, "completion": answer, "label": number % 2 == 0}
            else:
                turns = [("user", question), ("assistant", answer)]
                row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            stream.write(json.dumps(row) + "\n")


def line_of(row: dict[str, Any]) -> str:
    """A row as one line for the terminal; "*" where the error is larger than it may be."""
    share = row["predicted_peak_bytes"] / row["peak_bytes"] - 1
    mark = "" if ALLOWED[0] <= share <= ALLOWED[1] else " *"
    return (
        f"{row['case']:34} {row['predicted_peak_bytes'] / 1e6:6.0f} MB predicted, {row['peak_bytes'] / 1e6:6.0f} MB "
        f"measured {share:+6.1%}{mark:2} | fettle plan {row['plan_command_peak_bytes'] / 1e6:6.0f} MB | "
        f"{row['tokens']} tokens, {row['layers']}"
    )


if __name__ == "__main__":
    main()
