"""Peak memory and seconds a step: as the plan predicts them against what a fresh process then takes.

    python benchmarks/predictions.py [--only phi] [--out benchmarks/results/predictions.json]

Every case is a model with fewer layers than it has, with random weights, so that one takes seconds.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fresh
from machine import circumstances
from shapes import SHAPES

OUT = Path(__file__).parent / "results" / "predictions.json"
STEPS = 3

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
SMALL: dict[str, dict[str, Any]] = {
    "small llama": _TOKENS
    | {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "small qwen3": _TOKENS
    | {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 50000,
        "max_position_embeddings": 4096,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """policy: no layer is redone ("none"), every one ("all"), or as a budget halfway between the two demands."""

    model: str
    layers: int
    tokens: int
    documents: int = 1
    rank: int = 16
    quantization: str | None = None
    policy: str = "none"


CASES = (
    Case(model="phi-3.5-mini", layers=2, tokens=1024, policy="none"),
    Case(model="phi-3.5-mini", layers=2, tokens=1024, policy="all"),
    Case(model="phi-3.5-mini", layers=2, tokens=1024, policy="between"),
    Case(model="phi-3.5-mini", layers=2, tokens=1024, documents=8),
    Case(model="phi-3.5-mini", layers=4, tokens=1024, quantization="nf4", policy="none"),
    Case(model="phi-3.5-mini", layers=4, tokens=1024, quantization="nf4", policy="all"),
    Case(model="phi-3.5-mini", layers=4, tokens=1024, quantization="nf4", policy="between"),
    Case(model="phi-3.5-mini", layers=2, tokens=2048, rank=64),
    Case(model="phi-3.5-mini", layers=4, tokens=256, rank=8),
    Case(model="llama-3.1-8b", layers=2, tokens=512),
    Case(model="llama-3.1-8b", layers=2, tokens=512, rank=32, quantization="nf4", policy="all"),
    Case(model="llama-3.1-8b", layers=1, tokens=1024, rank=64, policy="all"),
    Case(model="tinyllama-1.1b", layers=4, tokens=2048, policy="none"),
    Case(model="tinyllama-1.1b", layers=4, tokens=2048, policy="all"),
    Case(model="tinyllama-1.1b", layers=4, tokens=2048, policy="between"),
    Case(model="tinyllama-1.1b", layers=4, tokens=512, rank=64, quantization="nf4"),
    Case(model="tinyllama-1.1b", layers=4, tokens=1024, documents=4, rank=8, policy="all"),
    Case(model="gemma-2-9b", layers=2, tokens=256, rank=8),
    Case(model="gemma-2-9b", layers=1, tokens=512, quantization="nf4", policy="all"),
    Case(model="small llama", layers=12, tokens=1024, rank=32),
    Case(model="small llama", layers=12, tokens=2048, documents=8, rank=8, policy="all"),
    Case(model="small llama", layers=6, tokens=512, quantization="nf4"),
    Case(model="small qwen3", layers=8, tokens=512, rank=32),
    Case(model="small qwen3", layers=8, tokens=1024, rank=64, quantization="nf4", policy="all"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose model's name begins so")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    content: dict[str, Any] = {"kind": "predictions"} | circumstances() | {"rows": []}
    for row in rows(case for case in CASES if case.model.startswith(options.only)):
        content["rows"].append(row)
        fresh.write(options.out, content)
        print(line_of(row), flush=True)


def rows(cases: Any) -> Iterator[dict[str, Any]]:
    """Measure case after case; the two ends of a "between" come before it."""
    predicted: dict[Case, int] = {}
    for case in cases:
        memory = None
        if case.policy == "between":
            memory = sum(predicted[replace(case, policy=end)] for end in ("none", "all")) // 2
        try:
            result = measure(case, memory)
        except fresh.Failed as failure:
            yield asdict(case) | {"failed": str(failure)}
            continue
        predicted[case] = result["plan"]["peak_bytes"]
        yield asdict(case) | row_of(result)


def measure(case: Case, memory: int | None) -> dict[str, Any]:
    """The contender's result in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(SMALL.get(case.model) or SHAPES[case.model]))
        words = f"fettle --config {config} --layers {case.layers} --tokens {case.tokens} --rank {case.rank}"
        words += f" --documents {case.documents} --steps {STEPS}"
        words += f" --quantization {case.quantization}" if case.quantization else ""
        words += f" --memory {memory}" if memory else f" --redo {case.policy}"
        return fresh.run("contender.py", *words.split())


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured side by side. The first step warms up and is left out."""
    plan = result["plan"]
    return {
        "layer_policies": plan["layers"],
        "predicted_peak_bytes": plan["peak_bytes"],
        "peak_bytes": result["peak_bytes"],
        "load_peak_bytes": result["load_peak_bytes"],
        "predicted_seconds": plan["seconds"],
        "seconds": statistics.median(result["seconds"][1:]),
        "all_seconds": result["seconds"],
    }


def error(row: dict[str, Any], name: str) -> float:
    """How far the prediction lies above what was measured, as a share of it."""
    return float(row[f"predicted_{name}"] / row[name] - 1)


def mark(share: float) -> str:
    """Says how bad an error is: "*" beyond 10%, "**" beyond 25%."""
    return "*" * (int(abs(share) > 0.10) + int(abs(share) > 0.25))


def line_of(row: dict[str, Any]) -> str:
    """A row as one line for the terminal."""
    name = f"{row['model']} x{row['layers']} {row['tokens']}/{row['documents']} r{row['rank']}"
    name += f" {row['quantization'] or 'bf16'} {row['policy']}"
    if "failed" in row:
        return f"{name:55} failed: {row['failed']}"
    peak, seconds = error(row, "peak_bytes"), error(row, "seconds")
    return (
        f"{name:55} {row['peak_bytes'] / 1e9:6.2f} GB {peak:+7.1%}{mark(peak):2} "
        f"{row['seconds']:6.2f} s {seconds:+7.1%}{mark(seconds):2} {row['layer_policies']}"
    )


if __name__ == "__main__":
    main()
