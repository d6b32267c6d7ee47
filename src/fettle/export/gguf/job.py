"""Export what `--model` names as GGUF files: one pass over the weights, a verification, and a Modelfile."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil
from gguf import GGML_QUANT_SIZES
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fettle.engine.llama_cpp.context import CONTEXT_STEP
from fettle.events import Message, Report, ignore, progress
from fettle.export.gguf.importance import read_importance
from fettle.export.gguf.metadata import ignored_window
from fettle.export.gguf.proof import prove
from fettle.export.gguf.tokenizer import template_begins
from fettle.export.gguf.types import quantization_of
from fettle.export.gguf.write import require_name, shapes_of, write_gguf
from fettle.export.ollama import modelfile
from fettle.export.source import open_source
from fettle.files import human_bytes, require_new_file, write_aside


def export_gguf(
    name: str | Path,
    to: Path,
    *,
    quantizations: Sequence[str] = ("q4_k_m",),
    importance: Path | None = None,
    overwrite: bool = False,
    check: bool = False,
    ollama: bool = False,
    report: Report = ignore,
) -> list[Path]:
    """Write the model that `name` refers to, with its adapter merged, as GGUF and return the files.

    to: the file, my-model.gguf; with several quantizations their names are added, as in my-model-q4_k_m.gguf.
    importance: llama.cpp's importance matrix (a .gguf of llama-imatrix). check: run each file in llama.cpp and report
    how it compares with the model. ollama: write a Modelfile next to each file. Raises UserError for faults that the
    user can fix. Each file is written completely or not at all.
    """
    files = files_for(Path(to), quantizations)
    modelfiles = {path: path.with_name(f"{path.stem}.Modelfile") for path in files.values()} if ollama else {}
    for place in (*files.values(), *modelfiles.values()):
        require_new_file(place, replace=overwrite)
    source = open_source(name)
    # Before anything is written: a chat template may be at fault.
    texts = {path: modelfile(path.name, source.tokenizer, source.stop_ids) for path in modelfiles}
    for line in (
        _window_line(source.config),
        _longrope_line(source.config),
        _first_token_line(source.tokenizer),
    ):
        if line is not None:
            report(Message(line))
    _tell_of_narrow(shapes := shapes_of(source.config), files, report)
    weights = {} if importance is None else read_importance(importance, shapes)
    with progress(f"writing {', '.join(files)}", report) as advance:

        def on_progress(done: int, total: int) -> None:
            memory = human_bytes(psutil.Process().memory_info().rss)
            advance(done / total, f"{done / 1e9:.2f} of {total / 1e9:.2f} G weights, {memory} memory")

        write_gguf(
            source.tensors(), source.config, source.tokenizer, files,
            name=source.name, stop_ids=source.stop_ids, importance=weights, overwrite=overwrite, progress=on_progress,
        )  # fmt: skip
    for path, place in modelfiles.items():
        with write_aside(place, replace=overwrite) as aside:
            aside.write_text(texts[path], encoding="utf-8")
    if check:
        prove(source, files, report)
    return list(files.values())


def _window_line(config: PreTrainedConfig) -> str | None:
    """Return the warning for a model whose sliding window llama.cpp ignores."""
    if (window := ignored_window(config)) is None:
        return None
    return f"llama.cpp ignores this model's sliding window: results differ beyond {window:,} tokens."


def _longrope_line(config: PreTrainedConfig) -> str | None:
    """Return the warning for a model whose original LongRoPE context llama.cpp rounds."""
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") if rope["rope_type"] == "longrope" else None
    if original is None or original % CONTEXT_STEP == 0 or rope["short_factor"] == rope["long_factor"]:
        return None
    return (
        f"llama.cpp uses LongRoPE's long factors beyond {original // CONTEXT_STEP * CONTEXT_STEP:,} tokens, the model "
        f"beyond {original:,}: results differ in between (llama.cpp rounds contexts to multiples of {CONTEXT_STEP})."
    )


def _first_token_line(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the warning for a model whose chats do not begin with the token that the tokenizer adds to other texts."""
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not tokenizer.chat_template or not begins or template_begins(tokenizer):
        return None
    return (
        f"this model's chat template does not begin with {tokenizer.bos_token}, so the file sets add_bos_token = "
        "false: llama.cpp then tokenizes chats as in training, but plain texts get no such token either."
    )


def _tell_of_narrow(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], report: Report) -> None:
    """Report one line per quantization whose blocks do not divide the width of some matrices."""
    matrices = {name: shape[-1] for name, shape in shapes.items() if len(shape) == 2}
    for each in names:
        block = GGML_QUANT_SIZES[quantization_of(each).usual][0]
        if narrow := [name for name, width in matrices.items() if width % block]:
            line = (
                f"{each}: {len(narrow)} of {len(matrices)} matrices use a larger type, as blocks of {block} do not "
                f"divide their width ({narrow[0]}: {matrices[narrow[0]]})."
            )
            report(Message(line))


def files_for(to: Path, quantizations: Sequence[str]) -> dict[str, Path]:
    """Return each quantization's file; UserError for an unknown one, or for a name without the .gguf extension."""
    names = list(dict.fromkeys(each.lower() for each in quantizations))
    for each in names:
        quantization_of(each)
    require_name(to)
    if len(names) == 1:
        return {names[0]: to}
    return {each: to.with_name(f"{to.stem}-{each}.gguf") for each in names}
