# ruff: noqa: B023  (what is measured runs before the loop goes on)
"""Everything worth knowing on one GPU, in one call of at most ten minutes: results land as they come.

    python benchmarks/gpu.py --out FOLDER [--minutes 9] [--only kernels,ceiling,ops,models,preference,contexts]

kernels: every op on the card against fp64. ceiling: bare matrix products and copies. ops: one op at a time
against what the card allows. models: steps of fettle and of TRL at full size, random weights. preference: the same for
pairs, by TRL's DPO trainer. contexts: peak memory of long rows in NF4. One process does all of it, as importing
the libraries takes longer than a step.
"""

import argparse
import gc
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import contender
from machine import circumstances

from fettle.errors import UserError

DEVICE = torch.device("cuda")
MODELS = ("phi-3.5-mini", "llama-3.1-8b", "tinyllama-1.1b", "mistral-7b", "gemma-2-9b")
STEPS = 8
PEERS_SHARE = {
    "phi-3.5-mini": 0.50, "llama-3.1-8b": 0.42, "tinyllama-1.1b": 0.26, "mistral-7b": 0.38, "gemma-2-9b": 0.42,
    "dpo": 0.81,
}  # fmt: skip
"""Of TRL's peak, what the peers' published tables leave."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="kernels,ceiling,ops,models,preference,contexts")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contenders", default="trl,fettle,nf4", help="trl first: nf4's budget hangs on it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu.json", time.monotonic() + 60 * options.minutes)
    parts: dict[str, Callable[[Report, argparse.Namespace], None]] = {
        "kernels": kernels, "ceiling": ceiling, "ops": ops, "models": models,
        "preference": preference, "contexts": contexts,
    }  # fmt: skip
    for name in options.only.split(","):
        parts[name](report, options)


class Report:
    """Results by part, written after each; a part that fails says so and the next goes on."""

    def __init__(self, file: Path, deadline: float) -> None:
        self.file, self.deadline = file, deadline
        properties = torch.cuda.get_device_properties(0)
        self.content: dict[str, Any] = {
            "kind": "gpu",
            "commit": circumstances()["commit"],
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "torch": torch.__version__,
            "results": [],
        }

    def take(self, part: str, name: str, measure: Callable[[], Any]) -> Any:
        if time.monotonic() > self.deadline:
            print(f"{part} {name}: no time left", flush=True)
            return None
        started = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        seconds = time.monotonic() - started
        self.content["results"].append({"part": part, "name": name, "took": seconds, "found": found})
        self.file.write_text(json.dumps(self.content, indent=1))
        print(f"{part} {name} ({seconds:.0f} s): {json.dumps(found)[:700]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        return found


def seconds_of(run: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call, by CUDA's events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


# --- correctness -------------------------------------------------------------------------------------------


def kernels(report: Report, options: argparse.Namespace) -> None:
    """Relative error against fp64, and that of the plain formula in the same dtype."""
    from fettle.ops.attention import Documents, packed_attention, packed_attention_reference
    from fettle.ops.gated_activation import gated_activation, gated_activation_reference, gelu_tanh
    from fettle.ops.nf4 import nf4_dequantize, nf4_dequantize_reference, nf4_quantize
    from fettle.ops.rms_norm import rms_norm
    from fettle.ops.rotary import apply_rotary, apply_rotary_reference

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    def compare(
        ours: Any, reference: Any, *inputs: torch.Tensor, dtype: torch.dtype
    ) -> dict[str, list[float]]:
        results = []
        for function, kind in ((ours, dtype), (reference, dtype), (reference, torch.float64)):
            given = [x.to(dtype).to(kind).requires_grad_() for x in inputs]
            output = function(*given)
            torch.manual_seed(1)
            weights = torch.randn(output.shape, device=DEVICE).to(dtype).to(kind)
            results.append([output, *torch.autograd.grad((output * weights).sum(), given)])
        found, plain, exact = results
        return {
            name: [float((a.double() - b).norm() / b.norm()) for a, b in zip(each, exact, strict=True)]
            for name, each in (("ours", found), ("plain", plain))
        }

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for offset in (False, True):
            report.take("kernels", f"rms_norm offset={offset} {dtype}", lambda: compare(
                lambda x, w: rms_norm(x, w, 1e-5, offset=offset),
                lambda x, w: _norm(x, w, offset), random(300, 3072), random(3072), dtype=dtype))  # fmt: skip
        angles = random(1, 77, 96)
        cos, sin = angles.cos(), angles.sin()
        report.take("kernels", f"rotary {dtype}", lambda: compare(
            lambda x: apply_rotary(x, cos.to(x.dtype), sin.to(x.dtype)),
            lambda x: apply_rotary_reference(x, cos.to(dtype).to(x.dtype), sin.to(dtype).to(x.dtype)),
            random(2, 8, 77, 96), dtype=dtype))  # fmt: skip
        for activation in (torch.nn.functional.silu, gelu_tanh):
            report.take("kernels", f"gate {activation.__name__} {dtype}", lambda: compare(
                lambda g, u: gated_activation(g, u, activation),
                lambda g, u: gated_activation_reference(g, u, activation),
                random(130, 1000), random(130, 1000), dtype=dtype))  # fmt: skip
        if dtype == torch.float32:
            continue
        is_start = torch.zeros(700, dtype=torch.bool, device=DEVICE)
        is_start[[0, 1, 130, 400]] = True
        documents = Documents.from_starts(is_start)
        for heads, shared, size in ((8, 8, 96), (8, 2, 128), (4, 2, 256), (4, 4, 64)):
            for rules in ({}, {"window": 100}, {"softcap": 20.0}, {"softcap": 20.0, "window": 100}):
                report.take("kernels", f"attention {heads}/{shared}x{size} {rules} {dtype}", lambda: compare(
                    lambda q, k, v: packed_attention(q, k, v, documents, scale=size**-0.5, **rules),
                    lambda q, k, v: packed_attention_reference(q, k, v, documents, scale=size**-0.5, **rules),
                    random(700, heads, size), random(700, shared, size), random(700, shared, size),
                    dtype=dtype))  # fmt: skip
    packed = nf4_quantize(random(3072, 1024).bfloat16())
    report.take("kernels", "nf4 bit-equal", lambda: torch.equal(
        nf4_dequantize(packed, torch.bfloat16), nf4_dequantize_reference(packed, torch.bfloat16)))  # fmt: skip


def _norm(x: torch.Tensor, weight: torch.Tensor, offset: bool) -> torch.Tensor:
    """The norm's formula in the inputs' own precision."""
    scale = 1 + weight if offset else weight
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale


# --- ceilings and single ops -------------------------------------------------------------------------------


def ceiling(report: Report, options: argparse.Namespace) -> None:
    """Products at the shapes of a layer, and a copy: operations and bytes a second."""

    def product(tokens: int, inputs: int, outputs: int) -> float:
        x = torch.randn(tokens, inputs, device=DEVICE, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=DEVICE, dtype=torch.bfloat16)
        return 2 * tokens * inputs * outputs / seconds_of(lambda: torch.nn.functional.linear(x, weight))

    for shape in ((2048, 3072, 16384), (2048, 8192, 3072), (2048, 4096, 14336), (8192, 3072, 16384)):
        report.take("ceiling", f"product {shape}", lambda: product(*shape))
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    report.take("ceiling", "copy", lambda: 2 * source.numel() / seconds_of(lambda: target.copy_(source)))


def ops(report: Report, options: argparse.Namespace) -> None:
    """Seconds of each op at Phi-3.5-mini's shapes and 4,096 tokens, and the floor by bytes or operations."""
    from fettle.ops.attention import Documents, packed_attention
    from fettle.ops.gated_activation import gated_activation_backward, gated_activation_forward
    from fettle.ops.nf4 import nf4_dequantize, nf4_quantize
    from fettle.ops.rms_norm import rms_norm
    from fettle.ops.token_log_probs import token_log_probs

    tokens, bf16 = 4096, torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=bf16)

    x, weight = random(tokens, 3072), random(3072)
    gate, up = random(tokens, 8192), random(tokens, 8192)
    packed = nf4_quantize(random(16384, 3072))
    head, hidden = random(32064, 3072), random(tokens, 3072).requires_grad_()
    labels = torch.randint(0, 32064, (tokens,), device=DEVICE)
    size = tokens * 8192 * 2
    bytes_and_runs: dict[str, tuple[int, Callable[[], object]]] = {
        "rms_norm": (2 * tokens * 3072 * 2, lambda: rms_norm(x, weight, 1e-5)),
        "gate forward": (3 * size, lambda: gated_activation_forward(gate, up, "silu")),
        "gate backward": (6 * size, lambda: gated_activation_backward(gate, gate, up, "silu")),
        "nf4_dequantize": (int(16384 * 3072 * 2.516), lambda: nf4_dequantize(packed, bf16)),
    }
    for name, (moved, run) in bytes_and_runs.items():
        report.take("ops", f"{name}, bytes a second", lambda: moved / seconds_of(run))
    report.take("ops", "head, operations a second", lambda: 4 * tokens * 3072 * 32064 / seconds_of(
        lambda: token_log_probs(hidden, head, labels).log_probs.sum()))  # fmt: skip
    is_start = torch.zeros(tokens, dtype=torch.bool, device=DEVICE)
    is_start[0] = True
    documents = Documents.from_starts(is_start)
    for heads, shared, channels, softcap in ((32, 32, 96, None), (32, 8, 128, None), (16, 8, 256, 50.0)):
        q, k, v = (random(tokens, n, channels).requires_grad_() for n in (heads, shared, shared))

        def forward() -> torch.Tensor:
            return packed_attention(q, k, v, documents, scale=channels**-0.5, softcap=softcap)

        grad = torch.randn_like(forward())
        operations = 2 * tokens * tokens * heads * channels
        name = f"attention {heads}/{shared}x{channels} softcap={softcap}"
        report.take("ops", f"{name} forward, operations a second", lambda: operations / seconds_of(forward))
        report.take("ops", f"{name} both, operations a second", lambda: 3.5 * operations / seconds_of(
            lambda: forward().backward(grad)))  # fmt: skip


# --- whole models ------------------------------------------------------------------------------------------


def _run(words: str) -> dict[str, Any]:
    return contender.run(contender.parser().parse_args(words.split()))


def models(report: Report, options: argparse.Namespace) -> None:
    """Seconds a step and peak memory at 2,048 tokens: TRL's defaults, fettle in bf16, and in NF4 with the share of
    TRL's peak that the peers leave as a budget."""
    for model in options.models.split(","):
        _compare_with_trl(report, "models", model, options, f"--model {model} --tokens 2048 --steps {STEPS}")


def preference(report: Report, options: argparse.Namespace) -> None:
    """A pair of 1,024 tokens each a step, at Zephyr's shape (Mistral 7B), by TRL's DPO trainer."""
    line = f"--method dpo --model mistral-7b --tokens 1024 --steps {STEPS}"
    _compare_with_trl(report, "preference", "mistral-7b", options, line)


def _compare_with_trl(report: Report, part: str, model: str, options: argparse.Namespace, line: str) -> None:
    base = None
    for name in options.contenders.split(","):
        words = f"{'trl' if name == 'trl' else 'fettle'} {line}"
        if name == "nf4":
            words += " --quantization nf4"
            share = PEERS_SHARE["dpo" if part == "preference" else model]
            words += f" --memory {int(share * base['peak_bytes'])}" if base and "peak_bytes" in base else ""
        found = report.take(part, f"{model} {name}", lambda: _run_or_leanest(words))
        base = found if name == "trl" else base


def _run_or_leanest(words: str) -> dict[str, Any]:
    """Where the budget is too little for any plan, what the refusal says is the least."""
    try:
        return _run(words)
    except UserError as error:  # its traceback holds the model: nothing runs before it is let go
        refusal = str(error)
    print(refusal, flush=True)
    gc.collect()
    least, unit = re.findall(r"least this run needs is ([\d.]+) (\w+)", refusal)[0]
    words = f"{words.partition(' --memory')[0]} --memory {1.01 * float(least)}{unit}"
    return _run(words) | {"refusal": refusal}


def contexts(report: Report, options: argparse.Namespace) -> None:
    """Peak memory of one long row in NF4."""
    for tokens in (8192, 32768, 131072):
        steps = 3 if tokens < 100_000 else 1
        line = (
            f"fettle --model phi-3.5-mini --tokens {tokens} --steps {steps} --quantization nf4 --memory 16GiB"
        )
        report.take("contexts", f"phi-3.5-mini {tokens}", lambda: _run(line))
    for tokens in (2048, 8192, 32768):
        line = (
            f"fettle --model llama-3.1-8b --tokens {tokens} --steps 2 --quantization nf4 --rank 32 --redo all"
        )
        report.take("contexts", f"llama-3.1-8b {tokens}", lambda: _run(line))


if __name__ == "__main__":
    main()
