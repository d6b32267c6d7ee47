"""`fettle export`: a model in a format that other programs read."""

import argparse
from pathlib import Path
from typing import Any, get_args

from fettle import terminal
from fettle.cli.arguments import add_dtype
from fettle.export.options import ExportOptions, Format

HELP = "merge the adapter and convert the model for other programs"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="checkpoint folder, train output, or hub name")
    command.add_argument(
        "--format",
        choices=get_args(Format),
        default="safetensors",
        help="safetensors: a folder for transformers and vLLM; nf4: the same in bitsandbytes 4-bit; fp8, w4a16: "
        "compressed for vLLM; gguf: a file for llama.cpp and Ollama; adapter-gguf: only the adapter, for llama.cpp",
    )
    command.add_argument("--to", required=True, type=Path, help="output: a new folder, or a new .gguf file")
    command.add_argument(
        "--overwrite", action="store_true", help="replace an existing .gguf file or model folder"
    )
    add_dtype(command)
    command.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload the result with a model card to the hub (a new repository is private)",
    )
    command.add_argument(
        "--data", help="your rows, to calibrate w4a16 or to measure the loss of fp8 before and after"
    )
    gguf = command.add_argument_group("for --format gguf")
    gguf.add_argument(
        "--quantization",
        nargs="+",
        metavar="KIND",
        help="q4_k_m (default), q8_0, f16, ...; several are written in one pass",
    )
    gguf.add_argument("--importance-matrix", type=Path, help="importance matrix from llama-imatrix (.gguf)")
    gguf.add_argument(
        "--verify", action="store_true", help="run the file in llama.cpp and compare it with the model"
    )
    gguf.add_argument("--ollama", action="store_true", help="write a Modelfile next to it")


def run(options: dict[str, Any]) -> None:
    from fettle.cli.display import displayed
    from fettle.export.job import export

    for path in displayed(export, progress_to_stderr=True)(ExportOptions(**options)):
        terminal.print_result(str(path))
