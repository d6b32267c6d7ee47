"""One checkpoint through llama.cpp's own converter and quantiser and through `fettle export`: metadata and tensors.

    python benchmarks/llama_cpp_tools.py CHECKPOINT --llama-cpp FOLDER --quantizer FOLDER/build/bin/llama-quantize

FOLDER is a checkout of llama.cpp, whose converter needs sentencepiece for some tokenizers. Prints what differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

QUANTIZATIONS = (
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q4_k_m",
    "q4_k_s",
    "iq4_xs",
    "q3_k_l",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--llama-cpp", required=True, type=Path)
    parser.add_argument("--quantizer", required=True, type=Path)
    parser.add_argument("--quantization", nargs="+", default=QUANTIZATIONS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_all(options, Path(folder))


def compare_all(options: argparse.Namespace, folder: Path) -> None:
    """The unquantised files first, with their metadata, then each quantization's tensors."""
    export = [sys.executable, "-m", "fettle", "export", "--model", options.checkpoint, "--format", "gguf"]
    run(*export, "--quantization", "bf16", *options.quantization, "--to", folder / "ours.gguf")
    converter, whole = options.llama_cpp / "convert_hf_to_gguf.py", folder / "theirs.gguf"
    paths = os.pathsep.join(filter(None, (str(options.llama_cpp / "gguf-py"), os.environ.get("PYTHONPATH"))))
    run(
        sys.executable,
        converter,
        options.checkpoint,
        "--outtype",
        "bf16",
        "--outfile",
        whole,
        PYTHONPATH=paths,
    )
    ours, theirs = GGUFReader(folder / "ours-bf16.gguf"), GGUFReader(whole)
    for line in metadata_differences(ours, theirs):
        print(line)
    print(f"bf16: {tensor_differences(ours, theirs)}", flush=True)
    for name in options.quantization:
        quantized = folder / "quantized.gguf"
        run(options.quantizer, whole, quantized, name.upper())
        found = tensor_differences(GGUFReader(folder / f"ours-{name}.gguf"), GGUFReader(quantized))
        print(f"{name}: {found}", flush=True)


def run(*words: object, **environment: str) -> None:
    """Run a command quietly; SystemExit with the end of what it said where it fails."""
    ended = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, env=os.environ | environment
    )
    if ended.returncode:
        raise SystemExit(f"{' '.join(map(str, words[:4]))} ...: {(ended.stdout + ended.stderr)[-1500:]}")


def metadata_differences(ours: GGUFReader, theirs: GGUFReader) -> list[str]:
    found, expected = fields(ours), fields(theirs)
    return [
        f"{name}: ours {str(found.get(name))[:80]}, llama.cpp's {str(expected.get(name))[:80]}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]


def fields(file: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}


def tensor_differences(ours: GGUFReader, theirs: GGUFReader) -> str:
    """How many tensors are missing, of another type, of other bytes."""
    found, expected = ({tensor.name: tensor for tensor in file.tensors} for file in (ours, theirs))
    both = found.keys() & expected.keys()
    types = [name for name in both if found[name].tensor_type != expected[name].tensor_type]
    contents = [
        name
        for name in both
        if name not in types and not np.array_equal(found[name].data, expected[name].data)
    ]
    missing = found.keys() ^ expected.keys()
    counts = f"{len(both)} tensors in both, {len(missing)} in one, {len(types)} of another type, "
    return counts + f"{len(contents)} of other bytes {[*missing, *types, *contents][:5] or ''}".rstrip()


if __name__ == "__main__":
    main()
