"""Write the tables and bar charts of docs/benchmarks.md, between its markers, from the files in results/.

python benchmarks/tables.py [FILE ...]
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from predictions import error, mark

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BAR, LEFT, WIDTH = 26, 330, 700


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]] or sorted((HERE / "results").glob("*.json"))
    page = PAGE.read_text() if PAGE.exists() else "# Benchmarks\n"
    for file in files:
        content = json.loads(file.read_text())
        text = f"{TABLES[content['kind']](content)}\n\n{circumstances_line(content)}"
        if content["kind"] == "comparison":
            chart = PAGE.with_name(f"benchmarks-{file.stem}.svg")
            chart.write_text(bars(content["rows"]))
            text = f"![Seconds per step]({chart.name})\n\n{text}"
        page = between_markers(page, file.stem, text)
    PAGE.write_text(page)


def between_markers(page: str, name: str, text: str) -> str:
    """The page with the text between the name's markers, which are added at the end if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    block = f"{begin}\n{text}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, page, flags=re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_table(content: dict[str, Any]) -> str:
    rows = [
        [
            row["name"] + (", in fp32" if is_base and row["runs"][0].get("dtype") == "float32" else ""),
            f"{row['step_seconds']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['times_as_fast']:.2f}" if "base" in row else "",
            f"{row['share_of_peak']:.2f}" if "base" in row else "",
        ]
        if "step_seconds" in row
        else [row["name"], "failed", *[""] * 5]
        for row in content["rows"]
        for is_base in [row["contender"] == "trl"]
    ]
    head = [
        "",
        "seconds per step",
        "tokens/s",
        "of the ceiling",
        "peak, GB",
        "times as fast",
        "of TRL's peak",
    ]
    return table(head, rows)


def predictions_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        name = f"{row['model']}, {row['layers']} layers, {row['documents']} x {row['tokens'] // row['documents']}"
        name += f", rank {row['rank']}, {row['quantization'] or 'bf16'}, {row['policy']}"
        if "failed" in row:
            rows.append([name, "failed", "", "", ""])
            continue
        peak, seconds = error(row, "peak_bytes"), error(row, "seconds")
        peak_cell = f"{peak:+.1%} {mark(peak)}".strip()
        seconds_cell = f"{seconds:+.1%} {mark(seconds)}".strip()
        rows.append(
            [name, f"{row['peak_bytes'] / 1e9:.2f}", peak_cell, f"{row['seconds']:.2f}", seconds_cell]
        )
    return table(["", "peak, GB", "predicted", "seconds per step", "predicted"], rows)


def ops_table(content: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['floor_seconds']:.2f}",
            f"{row['seconds'] / row['floor_seconds']:.1f}",
        ]
        for row in content["rows"]
    ]
    return table(["", "ms", "floor, ms", "times the floor"], rows)


def gpu_table(content: dict[str, Any]) -> str:
    """Whole models, preference training, and long contexts, a table of each that was measured."""
    head = ["", "ms per step", "times as fast", "peak, GB", "predicted", "of TRL's peak"]
    contexts = [
        [
            f"{result['name'].split()[0]}, {int(result['name'].split()[1]):,} tokens, rank {rank}",
            f"{min(run['seconds']):.2f}",
            f"{run['plan']['seconds']:.2f}",
            *_peaks(run),
        ]
        for result in content["results"]
        if result["part"] == "contexts" and "seconds" in (run := result["found"])
        for rank in [32 if "llama" in result["name"] else 16]
    ]
    tables = [
        ("A row of 2,048 tokens, rank 16:", head, against_trl(content, "models")),
        ("Pairs of 1,024 tokens each, by TRL's DPO trainer:", head, against_trl(content, "preference")),
        (
            "One row in NF4, Phi-3.5-mini with a budget of 16 GiB, Llama with every layer recomputed (one to three "
            "steps each, of which the first two prepare the graph):",
            ["", "seconds per step", "predicted", "peak, GB", "predicted"],
            contexts,
        ),
    ]
    return "\n\n".join(f"{title}\n\n{table(columns, rows)}" for title, columns, rows in tables if rows)


def against_trl(content: dict[str, Any], part: str) -> list[list[str]]:
    """Medians of the steps after the graph was recorded; TRL's row is what the others refer to."""
    found = {
        r["name"]: r["found"] for r in content["results"] if r["part"] == part and "seconds" in r["found"]
    }
    rows = []
    for name, run in found.items():
        model, contender = name.split()
        seconds, base = (statistics.median(each["seconds"][3:]) for each in (run, found[f"{model} trl"]))
        losses = run["losses"][0], found[f"{model} trl"]["losses"][0]
        is_same = abs(losses[0] - losses[1]) < 0.01 * losses[1]  # NF4's weights are other ones, if near
        label = CONTENDERS[contender]
        if contender == "nf4":
            memory = (
                run["memory"] or ""
            )  # a share of TRL's peak in bytes; a refused one was replaced, with a unit
            label += f", budget {int(memory) / 1e9:.2f} GB" if memory.isdecimal() else ", the leanest plan"
        rows.append(
            [
                f"{model}, {label}",
                f"{1e3 * seconds:.0f}",
                f"{base / seconds:.1f}" if is_same else "other loss",
                *_peaks(run),
                f"{run['peak_bytes'] / found[f'{model} trl']['peak_bytes']:.2f}" if is_same else "",
            ]
        )
    return rows


def _peaks(run: dict[str, Any]) -> list[str]:
    predicted = f"{run['plan']['peak_bytes'] / 1e9:.2f}" if run["plan"] else ""
    return [f"{run['peak_bytes'] / 1e9:.2f}", predicted]


CONTENDERS = {"fettle": "fettle, bf16", "nf4": "fettle, NF4", "trl": "TRL's defaults, bf16"}


def watched_table(content: dict[str, Any]) -> str:
    """One command on a full-size model, as `export.watched` saw it."""
    what = ", ".join(content.get("quantizations", ["NF4"]))
    row = [
        f"{content['model']} in bf16 to {what}",
        f"{content['seconds']:.0f}",
        f"{content['peak_resident_bytes'] / 1e9:.2f}",
        f"{content['peak_own_bytes'] / 1e9:.2f}",
    ]
    return table(["", "seconds", "peak resident, GB", "without mapped files, GB"], [row])


def plan_memory_table(content: dict[str, Any]) -> str:
    """Whole processes: the peak as `fettle train` and `fettle plan` predict it, against the measured one."""
    rows = []
    for row in content["rows"]:
        peak = row["peak_bytes"]
        errors = (row[f"{name}_peak_bytes"] / peak - 1 for name in ("predicted", "plan_command"))
        rows.append([row["case"], f"{peak / 1e6:.0f}", *(f"{error:+.1%}" for error in errors)])
    return table(["", "peak, MB", "predicted by train", "predicted by plan"], rows)


def generation_table(content: dict[str, Any]) -> str:
    is_gpu = "gpu" in content
    cases = {"one": "1 request, tokens/s"}
    cases |= {"many": "64 requests, tokens/s"} if is_gpu else {}
    cases |= {"prompt_ms": "4,096-token prompt, ms" if is_gpu else "512-token prompt, s"}
    cases |= {"choices": "choices/s"} if is_gpu else {}

    def line(name: str, found: dict[str, float]) -> list[str]:
        cells = []
        for case in cases:
            value = found.get(case)
            if value is not None and case == "prompt_ms" and not is_gpu:
                value /= 1000
            cell = "" if value is None else f"{value:,.0f}" if is_gpu else f"{value:.2f}"
            cells.append(
                cell + (f" ({found['many_continuous']:,.0f})" if f"{case}_continuous" in found else "")
            )
        return [name, *cells]

    rows = []
    for row in content["rows"]:
        name = row["model"] + ({True: ", NF4", False: ", bf16"}[row["nf4"]] if "nf4" in row else "")
        contenders = {"the hardware's limit": "ceiling"}
        contenders |= {each: each for each in ("fettle", "transformers", "llama.cpp")}
        rows += [line(f"{name}: {label}", row[key]) for label, key in contenders.items() if key in row]
    return table(["", *cases.values()], rows)


def preference_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        budget = {None: "free", "trl": "TRL's peak"}.get(row["budget"], row["budget"])
        name = (
            "TRL"
            if row["contender"] == "trl"
            else row["contender"].replace("-unshared", ", prompts not shared")
        )
        name += "" if row["contender"] == "trl" else f", {budget}"
        shares = [f"{row[key]:.2f}" if key in row else "" for key in ("share_of_time", "share_above_weights")]
        timed = row["step_seconds"][-(len(row["step_seconds"]) - row.get("warm", 4)) :]
        rows.append(
            [
                f"{row['model']}, {row['quantization'] or row['dtype']}: {name}",
                f"{row['seconds'] / max(1, len(timed)):.2f}",
                f"{statistics.median(timed):.2f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
                *shares,
            ]
        )
    head = [
        "",
        "seconds per step, mean",
        "median",
        "peak, GB",
        "of TRL's time",
        "of TRL's memory above the weights",
    ]
    return table(head, rows)


TABLES = {
    "preference": preference_table,
    "generation": generation_table,
    "export": watched_table,
    "loading": watched_table,
    "comparison": comparison_table,
    "gpu": gpu_table,
    "plan memory": plan_memory_table,
    "predictions": predictions_table,
    "ops": ops_table,
}


def circumstances_line(content: dict[str, Any]) -> str:
    if content["kind"] == "generation" and "gpu" in content:
        versions = f"torch {content['versions']['torch']}, transformers {content['versions']['transformers']}"
        return f"{content['gpu']}; {versions}; commit {content['commit']}."
    if content["kind"] == "gpu":
        return f"{content['gpu']}; torch {content['torch']}; commit {content['commit']}."
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    if content["kind"] == "comparison":
        rounds = max(len(row["runs"]) for row in content["rows"])
        versions = f"rounds: {rounds}, of {content['steps']} steps, the first left out; {versions}"
    return f"{content['processor']}, {content['cores']} cores; {versions}; commit {content['commit']}."


def bars(rows: list[dict[str, Any]]) -> str:
    """An SVG bar chart of the seconds per step."""
    rows = [row for row in rows if "step_seconds" in row]
    longest = max(row["step_seconds"] for row in rows)
    height = BAR * len(rows) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, row in enumerate(rows):
        top, length = 5 + BAR * number, (WIDTH - LEFT - 70) * row["step_seconds"] / longest
        colour = "#8a8f98" if row["contender"] == "trl" else "#2f6fde"
        lines += [
            f'<text x="{LEFT - 8}" y="{top + 17}" text-anchor="end">{escape(row["name"])}</text>',
            f'<rect x="{LEFT}" y="{top + 3}" width="{length:.1f}" height="{BAR - 6}" fill="{colour}"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{top + 17}">{row["step_seconds"]:.2f} s</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    main()
