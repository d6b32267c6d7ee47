"""Contenders against each other: fresh processes in turn (A B A B ...), equal losses before any time is told.

    python benchmarks/compare.py --set short
    python benchmarks/compare.py --set phi
    python benchmarks/compare.py --model phi-3.5-mini --layers 4 --contenders trl,fettle,fettle-nf4 --memory trl

A budget of "trl" is the peak that TRL itself took in the first round, "trl/3" a third of it.
"""

import argparse
import importlib.util
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fresh
from contender import CONTENDERS
from machine import circumstances
from shapes import SHAPES

BASE = "trl"
LOSS_BOUND = 2**-9
"""Losses of one precision may differ by the rounding of one bf16 number: 0.02 at a loss of 11."""
NEEDS = {"trl": "trl", "trl-liger": "liger_kernel", "unsloth": "unsloth"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of a comparison. memory: fettle's budget, "8GB" or in terms of the base's peak, "trl" or "trl/3"."""

    name: str
    contender: str
    documents: int = 1
    quantization: str | None = None
    memory: str | None = None

    @property
    def is_base(self) -> bool:
        return self.contender == BASE

    @property
    def must_agree_with(self) -> tuple[int, str | None]:
        """Settings that share this must have the same losses."""
        return self.documents, self.quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What all settings share. layers: fewer than the model's, None for all of them."""

    settings: tuple[Setting, ...]
    model: str = "phi-3.5-mini"
    layers: int | None = None
    tokens: int = 1024
    rank: int = 16
    steps: int = 3

    def words(self) -> list[str]:
        layers = ["--layers", str(self.layers)] if self.layers else []
        return ["--model", self.model, *layers, "--tokens", str(self.tokens)]


TRL = Setting(name="TRL", contender="trl")
TRL_PACKED = Setting(name="TRL, 8 documents", contender="trl", documents=8)
BF16 = Setting(name="fettle, bf16, TRL's peak as budget", contender="fettle", memory="trl")
BF16_PACKED = Setting(
    name="fettle, bf16, 8 documents, TRL's peak as budget", contender="fettle", documents=8, memory="trl"
)
NF4 = Setting(name="fettle, NF4, 8 GB", contender="fettle", quantization="nf4", memory="8GB")
NF4_LEAN = Setting(
    name="fettle, NF4, a third of TRL's peak", contender="fettle", quantization="nf4", memory="trl/3"
)
NF4_SHORT = Setting(
    name="fettle, NF4, TRL's peak as budget", contender="fettle", quantization="nf4", memory="trl"
)

SETS = {
    "phi": Comparison(settings=(TRL, BF16, TRL_PACKED, BF16_PACKED, NF4, NF4_LEAN)),
    "short": Comparison(settings=(TRL, BF16, NF4_SHORT), layers=2, tokens=512),
}


@dataclass(slots=True)
class Runs:
    """A setting's results, a round each; failed: why it has no more of them."""

    setting: Setting
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None


def main() -> None:
    options = parser().parse_args()
    comparison = SETS[options.set] if options.set else from_options(options)
    out = options.out or Path(__file__).parent / "results" / f"{options.set or options.model}.json"
    ceiling = fresh.run("ceiling.py", *comparison.words())
    runs = run_all(comparison, options.rounds)
    check_losses(runs)
    content = {"kind": "comparison", "name": out.stem} | circumstances() | {"ceiling": ceiling}
    content |= asdict(comparison) | {"rows": [row_of(each, runs, comparison, ceiling) for each in runs]}
    fresh.write(out, content)
    for row in content["rows"]:
        print(line_of(row))
    print(f"written to {out}")


# --- running -----------------------------------------------------------------------------------------------


def run_all(comparison: Comparison, rounds: int) -> list[Runs]:
    """Every installed setting once a round, in the order given, so that a slow minute strikes all alike."""
    runs = [Runs(setting) for setting in comparison.settings if is_installed(setting)]
    for number in range(rounds):
        for each in runs:
            if each.failed is None:
                print(f"round {number + 1} of {rounds}: {each.setting.name}", flush=True)
                run_once(each, runs, comparison)
    return runs


def is_installed(setting: Setting) -> bool:
    """Whether the contender can run here; prints a line where it cannot."""
    package = NEEDS.get(setting.contender)
    if package is None or importlib.util.find_spec(package):
        return True
    print(f"{setting.name} is left out: {package} is not installed.")
    return False


def run_once(each: Runs, runs: list[Runs], comparison: Comparison) -> None:
    """One fresh process. A failure is noted, and only the base's ends everything."""
    setting = each.setting
    words = [setting.contender, *comparison.words(), "--rank", str(comparison.rank)]
    words += ["--steps", str(comparison.steps), "--documents", str(setting.documents)]
    words += ["--quantization", setting.quantization] if setting.quantization else []
    try:
        if setting.memory:
            words += ["--memory", budget(setting.memory, base_of(setting, runs))]
        each.results.append(fresh.run("contender.py", *words))
    except fresh.Failed as failure:
        if setting.is_base:
            raise SystemExit(f"{setting.name} failed: {failure}") from None
        each.failed = str(failure)
        print(f"{setting.name} failed: {failure}", flush=True)


def base_of(setting: Setting, runs: list[Runs]) -> Runs | None:
    """The base with the same documents, or any, or None."""
    bases = [each for each in runs if each.setting.is_base]
    same = [each for each in bases if each.setting.documents == setting.documents]
    return next(iter(same + bases), None)


def budget(memory: str, base: Runs | None) -> str:
    """Bytes as contender.py takes them, with the base's own peak put in for its name."""
    name, _, divisor = memory.partition("/")
    if name != BASE:
        return memory
    if base is None or not base.results:
        raise fresh.Failed(f'a budget of "{memory}" needs {BASE} among the contenders, before this one')
    return str(base.results[0]["peak_bytes"] // int(divisor or 1))


# --- judging -----------------------------------------------------------------------------------------------


def check_losses(runs: list[Runs]) -> None:
    """Raise SystemExit unless all runs of one precision and the same documents have the same losses, step by step."""
    first: dict[tuple[int, str | None], tuple[str, list[float]]] = {}
    for each in runs:
        for result in each.results:
            name, expected = first.setdefault(
                each.setting.must_agree_with, (each.setting.name, result["losses"])
            )
            if not agree(expected, result["losses"]):
                raise SystemExit(
                    f"losses differ, so no time is told: {name} {expected}, {each.setting.name} {result['losses']}"
                )


def agree(expected: list[float], found: list[float]) -> bool:
    """Whether the losses are as many, and equal within LOSS_BOUND; a loss that is no number agrees with none."""
    pairs = zip(expected, found, strict=False)
    return len(expected) == len(found) and all(abs(a - b) <= LOSS_BOUND * abs(a) for a, b in pairs)


def row_of(each: Runs, runs: list[Runs], comparison: Comparison, ceiling: dict[str, Any]) -> dict[str, Any]:
    """A setting's figures: medians over all rounds' steps but each first, peaks at their worst."""
    row = asdict(each.setting) | {"runs": each.results, "failed": each.failed}
    if not each.results:
        return row
    seconds, peak = step_seconds(each.results), peak_of(each.results)
    row |= {
        "step_seconds": seconds,
        "peak_bytes": peak,
        "tokens_per_second": comparison.tokens / seconds,
        "share_of_ceiling": ceiling["floor_seconds"] / seconds,
    }
    if base := base_of(each.setting, runs):
        row |= {
            "base": base.setting.name,
            "times_as_fast": step_seconds(base.results) / seconds,
            "share_of_peak": peak / peak_of(base.results),
        }
    return row


def step_seconds(results: list[dict[str, Any]]) -> float:
    """Median over all runs, without each run's first step, which warms up."""
    return statistics.median(seconds for result in results for seconds in result["seconds"][1:])


def peak_of(results: list[dict[str, Any]]) -> int:
    return max(result["peak_bytes"] for result in results)


def line_of(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "step_seconds" not in row:
        return f"{row['name']:48} failed: {row['failed']}"
    line = f"{row['name']:48} {row['step_seconds']:7.2f} s {row['tokens_per_second']:7.0f} tokens/s"
    line += f" {row['peak_bytes'] / 1e9:6.2f} GB, {row['share_of_ceiling']:.0%} of the ceiling"
    if "base" in row:
        line += f", {row['times_as_fast']:.2f}x as fast with {row['share_of_peak']:.2f} of the memory"
    return line


# --- the command line --------------------------------------------------------------------------------------


def from_options(options: argparse.Namespace) -> Comparison:
    """A comparison of the contenders named; "fettle-nf4" is fettle with NF4 weights."""
    settings = []
    for name in options.contenders.split(","):
        contender, is_nf4 = name.removesuffix("-nf4"), name.endswith("-nf4")
        if contender not in CONTENDERS:
            raise SystemExit(f"{name} is no contender; known are {', '.join(CONTENDERS)} and fettle-nf4.")
        settings.append(
            Setting(
                name=name,
                contender=contender,
                documents=options.documents,
                quantization="nf4" if is_nf4 else None,
                memory=options.memory if contender == "fettle" else None,
            )
        )
    return Comparison(
        settings=tuple(settings), model=options.model, layers=options.layers, tokens=options.tokens,
        rank=options.rank, steps=options.steps,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", choices=sorted(SETS), help="a comparison by name; else the options below say it"
    )
    parser.add_argument("--contenders", default="trl,fettle")
    parser.add_argument("--model", choices=sorted(SHAPES), default="phi-3.5-mini")
    parser.add_argument("--layers", type=int, help="fewer than the model's")
    parser.add_argument("--tokens", type=int, default=1024, help="of a pack")
    parser.add_argument("--documents", type=int, default=1, help="equal documents in a pack")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="of a run; the first is not counted")
    parser.add_argument("--memory", help='fettle\'s budget: 8GB, or "trl", or "trl/3"')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
