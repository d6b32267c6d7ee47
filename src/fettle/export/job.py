"""`fettle export`: write one model in one of several formats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fettle.errors import UserError, option
from fettle.events import Message, Report, ignore
from fettle.export.checkpoint import export_nf4, export_safetensors
from fettle.export.hub import model_card, push, require_hub
from fettle.export.options import ONLY_FOR, ExportOptions


def export(options: ExportOptions, *, report: Report = ignore) -> list[Path]:
    """Write the export and return its files or folder. Raises UserError for faults that the user can fix."""
    options = replace(options, to=options.to.expanduser())
    for name, formats in ONLY_FOR.items():
        if getattr(options, name) not in (None, False, "auto") and options.format not in formats:
            raise UserError(
                f"{option(name)} requires {option('format')} {' or '.join(formats)}, but {option('format')} is "
                f"{options.format}."
            )
    if options.push is None:
        return _write(options, report)
    card = model_card(options.model, options.to.name, options.push, options.format)  # its faults show first
    require_hub(options.push)
    files = _write(options, report)
    report(Message(push(files, options.push, card)))
    return files


def _write(options: ExportOptions, report: Report) -> list[Path]:
    if options.format == "safetensors":
        return [
            export_safetensors(options.model, options.to, dtype=options.dtype, overwrite=options.overwrite)
        ]
    if options.format == "nf4":
        return [export_nf4(options.model, options.to, dtype=options.dtype, overwrite=options.overwrite)]
    if options.format in ("fp8", "w4a16"):
        return [_compressed(options, report)]
    from fettle.export.gguf import export_adapter_gguf, export_gguf  # these import llama.cpp's wheel

    if options.format == "adapter-gguf":
        return [export_adapter_gguf(options.model, options.to, overwrite=options.overwrite)]
    return export_gguf(
        options.model,
        options.to,
        quantizations=options.quantization or ["q4_k_m"],
        importance=options.importance_matrix,
        overwrite=options.overwrite,
        check=options.verify,
        ollama=options.ollama,
        report=report,
    )


def _compressed(options: ExportOptions, report: Report) -> Path:
    from fettle.export.compressed import export_four_bits, export_fp8

    if options.format == "w4a16" and options.data is None:
        raise UserError(
            f"{option('format')} w4a16 needs calibration rows: add {option('data')} (about 100 rows)."
        )
    write: Callable[..., Path] = export_fp8 if options.format == "fp8" else export_four_bits
    return write(
        options.model,
        options.to,
        data=options.data,
        report=report,
        overwrite=options.overwrite,
    )
