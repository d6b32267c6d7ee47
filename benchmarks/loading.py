"""A full-size checkpoint in bf16 into NF4: seconds, and the highest resident memory of the process.

    python benchmarks/loading.py [--model phi-3.5-mini] [--folder build]

Needs disk for the model in bf16.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import fresh
from export import watched, write_checkpoint
from machine import circumstances
from shapes import SHAPES

LOAD = "from pathlib import Path; from fettle.models.load import load_model; load_model(Path({!r}), quantization='nf4')"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="phi-3.5-mini")
    parser.add_argument("--folder", type=Path, default=Path("build/loading"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    options = parser.parse_args()
    source = options.folder / options.model
    shutil.rmtree(options.folder, ignore_errors=True)
    write_checkpoint(options.model, source)
    found = watched([sys.executable, "-c", LOAD.format(str(source))])
    found["checkpoint_bytes"] = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    fresh.write(options.out, {"kind": "loading", "model": options.model} | circumstances() | found)
    print(json.dumps(found, indent=1))
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
