"""The commands: parse, call, print. What they do stands in the packages they call."""

import argparse
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from fettle import __version__, terminal
from fettle.errors import Interrupted, ProofError, UserError, shortage
from fettle.export.options import ExportOptions, Format
from fettle.options import Parser, add_options, resolve
from fettle.threads import settle_threads
from fettle.training.defaults import require_sensible
from fettle.training.options import PlanOptions, PretrainOptions, TrainOptions

INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for what the user can mend, 1 for the rest, 130 after Ctrl-C."""
    options = vars(_parser().parse_args(arguments))
    quiet_libraries()
    settle_threads()
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a character that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    command: Callable[[dict[str, Any]], None] = options.pop("run")
    try:
        with _terminable():
            command(options)
    except (UserError, ProofError) as error:
        return _tell(f"error: {error}", 2 if isinstance(error, UserError) else 1)
    except Interrupted as stop:
        return _tell(f"interrupted. Go on with:\n  {stop}", INTERRUPTED)
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # closed at exit; nothing left to flush into the pipe
        return 1
    except Exception as error:
        if (lack := shortage(error)) is None:
            raise
        return _tell(f"error: {lack}", 2)
    return 0


def _tell(line: str, code: int) -> int:
    terminal.say(f"fettle: {line}")
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: nothing half-written stays, and a run says how to go on."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may listen
        yield
        return

    def end(*given: Any) -> None:
        listener = signal.getsignal(signal.SIGINT)
        (listener if callable(listener) else signal.default_int_handler)(*given)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """No usage pings, no progress bars and no advice from the libraries underneath."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which PEFT imports where it is installed
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"(torch|peft|trl|transformers|accelerate)\b.*"
    )


def _parser() -> Parser:
    parser = Parser(
        prog="fettle", description="Fine-tune small language models, with proof that they got better."
    )
    parser.add_argument("--version", action="version", version=f"fettle {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[dict[str, Any]], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    command = add("quickstart", _quickstart, "teach the embedded model a new skill and show the proof")
    command.add_argument("--output", default="quickstart", help="folder for the result (default: quickstart)")

    command = add("train", _train, "fine-tune a model on your data with a LoRA adapter")
    add_options(command, TrainOptions)
    _add_resume(command)

    command = add("plan", _plan, "say beforehand what a run takes: memory, time, the longest context")
    add_options(command, PlanOptions)

    command = add("generate", _generate, "complete one prompt; prints the completion alone")
    _add_model(command)
    command.add_argument("--prompt", required=True, help="the prompt; - reads it from standard input")
    command.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    _add_sampling(command, temperature=0.0)

    command = add("chat", _chat, "talk with a model in the terminal")
    _add_model(command)
    _add_sampling(command, temperature=0.7)

    command = add("compare", _compare, "show two models side by side on your rows: quality, size, speed")
    for letter in ("A", "B"):
        command.add_argument(
            letter.lower(), metavar=letter, help="checkpoint folder, output of train, GGUF file or hub name"
        )
    command.add_argument("--data", required=True, help="rows in any form that train reads")
    command.add_argument("--samples", type=int, default=64, help="rows compared at most (default: 64)")
    command.add_argument(
        "--max-length", type=int, default=1024, help="tokens of a row that count (default: 1024)"
    )
    command.add_argument("--seed", type=int, default=0, help="chooses the rows (default: 0)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")
    _add_device(command)
    _add_dtype(command)

    _add_export(add("export", _export, "hand a model over: its adapter merged in, in the form others open"))

    command = add("pretrain", _pretrain, "make a new small model from nothing, as the embedded one was")
    add_options(command, PretrainOptions)
    _add_resume(command)
    return parser


def _add_export(command: argparse.ArgumentParser) -> None:
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
    _add_dtype(command)
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


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        required=True,
        help="checkpoint folder, output of train, GGUF file, hub name, or fettle-tiny",
    )
    command.add_argument("--system", help="a system turn before the prompt")
    _add_device(command)
    _add_dtype(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to compute (default: cuda where there is one)"
    )


def _add_dtype(command: argparse.ArgumentParser) -> None:
    choices = ["auto", "float32", "bfloat16", "float16"]
    command.add_argument(
        "--dtype", choices=choices, default="auto", help="type of the weights (auto: as stored)"
    )


def _add_sampling(command: argparse.ArgumentParser, *, temperature: float) -> None:
    command.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: 512, or what the context has room for)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0: the likeliest words (default: {temperature})",
    )
    command.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this share"
    )
    command.add_argument("--seed", type=int, help="makes sampling repeatable")


def _add_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --output, with its own options",
    )


def _quickstart(options: dict[str, Any]) -> None:
    from fettle.quickstart import quickstart

    quickstart(Path(options["output"]))


def _train(options: dict[str, Any]) -> None:
    chosen = _run_options(options, TrainOptions)
    from fettle.training.sft import resume_training, train

    _fit(options, chosen, train, resume_training)


def _plan(options: dict[str, Any]) -> None:
    chosen = resolve(PlanOptions, options, options.pop("config", None))
    require_sensible(chosen)
    from fettle.training.planning import plan

    plan(chosen)


def _pretrain(options: dict[str, Any]) -> None:
    chosen = _run_options(options, PretrainOptions)
    from fettle.training.pretrain import pretrain, resume_pretraining

    _fit(options, chosen, pretrain, resume_pretraining)


def _run_options(options: dict[str, Any], kind: Any) -> Any:
    """A run's options, found sensible before the libraries are imported; None where one is to be resumed."""
    is_resumed, config = options.pop("resume"), options.pop("config", None)
    if is_resumed and (config is not None or set(options) != {"output"}):
        raise UserError(
            "--resume takes --output alone: the run goes on with the options it was started with."
        )
    if is_resumed:
        return None
    chosen = resolve(kind, options, config)
    require_sensible(chosen)
    return chosen


def _fit(typed: dict[str, Any], options: Any, start: Callable[..., Any], resume: Callable[..., Any]) -> None:
    """Start a run, or go on with one where there are no options, and print how it ended."""
    from fettle.training.outcome import show

    outcome = resume(Path(typed["output"])) if options is None else start(options)
    if outcome is None:
        terminal.say(f"the run in {typed['output']} has come to its end already", file=sys.stdout)
    else:
        show(outcome)


def _generate(options: dict[str, Any]) -> None:
    from fettle.adapters.load import load
    from fettle.generation import generate

    sampling = _sampling(options)
    prompt = _prompt(options["prompt"])
    model, tokenizer = load(options["model"], dtype=options["dtype"], device=options["device"])
    terminal.give(
        generate(model, tokenizer, prompt, raw=options["raw"], system=options["system"], sampling=sampling)
    )


def _chat(options: dict[str, Any]) -> None:
    from fettle.adapters.load import load
    from fettle.generation.chat import chat

    sampling = _sampling(options)
    model, tokenizer = load(options["model"], dtype=options["dtype"], device=options["device"])
    chat(model, tokenizer, sampling, system=options["system"])


def _prompt(given: str) -> str:
    """The prompt as typed; for -, standard input without its last line break."""
    try:
        prompt = sys.stdin.read().removesuffix("\n") if given == "-" else given
        prompt.encode()  # bytes of the command line that are no UTF-8 arrive as lone surrogates
    except UnicodeError as error:
        raise UserError("--prompt is not UTF-8 text.") from error
    return prompt


def _sampling(options: dict[str, Any]) -> Any:
    from fettle.generation import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return Sampling(**{name: options[name] for name in names})


def _compare(options: dict[str, Any]) -> None:
    from fettle.evaluation.comparison import show
    from fettle.evaluation.side_by_side import compare

    as_json = options.pop("json")
    comparison = compare(**options)
    if as_json:
        terminal.give(comparison.as_json())
    else:
        show(comparison)


def _export(options: dict[str, Any]) -> None:
    from fettle.export.job import export

    for path in export(ExportOptions(**options)):
        terminal.give(str(path))
