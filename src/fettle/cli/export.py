"""`fettle export`: hand a model over."""

import argparse
from pathlib import Path
from typing import Any, get_args

from fettle import terminal
from fettle.cli.arguments import add_dtype
from fettle.export.options import ExportOptions, Format

HELP = "hand a model over: its adapter merged in, in the form others open"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="checkpoint folder, output of train, or hub name")
    command.add_argument(
        "--format",
        choices=get_args(Format),
        default="safetensors",
        help="safetensors: a folder for transformers and vLLM; nf4: the same in bitsandbytes' four bits; fp8, w4a16: "
        "compressed for vLLM; gguf: a file for llama.cpp and Ollama; adapter-gguf: the adapter alone, for llama.cpp",
    )
    command.add_argument("--to", required=True, type=Path, help="new folder, or new .gguf file")
    command.add_argument(
        "--overwrite", action="store_true", help="replace a .gguf file, or a model's folder, that is there"
    )
    add_dtype(command)
    command.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the result to the hub, private if new, with a model card"
    )
    command.add_argument("--data", help="rows of yours: w4a16 is calibrated on them, fp8 compared")
    gguf = command.add_argument_group("for --format gguf")
    gguf.add_argument(
        "--quantization",
        nargs="+",
        metavar="KIND",
        help="q4_k_m (default), q8_0, f16, ...; several share one pass",
    )
    gguf.add_argument("--importance-matrix", type=Path, help="a .gguf that llama-imatrix wrote")
    gguf.add_argument(
        "--verify", action="store_true", help="run the file in llama.cpp and compare it with the model"
    )
    gguf.add_argument("--ollama", action="store_true", help="write a Modelfile beside it")


def run(options: dict[str, Any]) -> None:
    from fettle.export.job import export

    for path in export(ExportOptions(**options)):
        terminal.give(str(path))
