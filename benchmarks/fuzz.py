"""Broken input for every reader: `python benchmarks/fuzz.py --inputs 10000` prints what became of it.

Each reader runs in a process of its own, with limited memory: a native crash is a row of the table, and the input that
caused it is kept. Exits with 1 if any input did anything but work or be refused in a sentence.
"""

import argparse
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from hostile import READERS, outcome
from hypothesis import HealthCheck, Phase, given, seed, settings

MEMORY_BYTES = 16 * 2**30


def run_one(name: str, inputs: int, number: int, kept: Path) -> Counter[str]:
    """Read `inputs` broken inputs; return how they ended. The last one is always on disk."""
    reader, counts = READERS[name], Counter()

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs())
    def check(content):
        kept.write_bytes(pickle.dumps(content))
        started = time.perf_counter()
        try:
            counts[outcome(reader, content)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a library's Rust code is no Exception
            last = traceback.extract_tb(error.__traceback__)[-1]
            fault = (
                f"{type(error).__name__}: {str(error)[:150]!r} in {Path(last.filename).name}:{last.lineno}"
            )
            if counts[fault] == 0:
                kept.with_name(f"{kept.name}-{len(counts)}").write_bytes(pickle.dumps(content))
            counts[fault] += 1
        counts["milliseconds"] = max(counts["milliseconds"], round(1000 * (time.perf_counter() - started)))

    check()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="for each reader")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--reader", action="append", choices=list(READERS), help="one reader (default: all)")
    parser.add_argument(
        "--kept", type=Path, default=Path(tempfile.gettempdir()) / "fettle-fuzz", help="for bad inputs"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kept.mkdir(exist_ok=True)
    if options.child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        (name,) = options.reader
        counts = run_one(name, options.inputs, options.seed, options.kept / name.replace(" ", "-"))
        (options.kept / "counts").write_bytes(pickle.dumps(counts))  # libraries print on standard output
        return 0
    print(
        f"seed {options.seed}, at most {options.inputs:,} inputs for each reader; bad ones are in {options.kept}\n"
    )
    print("| reader | inputs | works | refused | wrong | longest, ms |\n|---|---|---|---|---|---|")
    is_bad = False
    for name in options.reader or READERS:
        inputs = max(1, int(options.inputs * READERS[name].share))
        words = [sys.executable, __file__, "--child", "--reader", name, "--inputs", str(inputs)]
        words += ["--seed", str(options.seed), "--kept", str(options.kept)]
        found = subprocess.run(words, capture_output=True, check=False)
        if found.returncode != 0:
            last = found.stderr.decode(errors="replace").strip().splitlines()[-1:]
            print(f"| {name} | | | | ended with {found.returncode}: {last} | |", flush=True)
            is_bad = True
            continue
        counts = pickle.loads((options.kept / "counts").read_bytes())
        works, refused, longest = (counts.pop(key, 0) for key in ("works", "refused", "milliseconds"))
        wrong = sum(counts.values())
        print(
            f"| {name} | {works + refused + wrong:,} | {works:,} | {refused:,} | {wrong:,} | {longest:,} |",
            flush=True,
        )
        for fault, count in counts.most_common(30):
            print(f"    {count:,} × {fault}", flush=True)
        is_bad |= wrong > 0
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
