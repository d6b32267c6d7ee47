"""Write GGUF files tensor by tensor: all requested quantizations in one pass over the weights.

A GGUF file begins with everything about its tensors except their bytes. Shapes follow from the config, so this header
is written first, with each tensor's offset in the file; then every tensor is written to its offset, in any order.
At most one tensor is in memory besides the source's own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fettle.engine.llama_cpp.library import library
from fettle.errors import UserError, option
from fettle.export.gguf.ggml import quantize
from fettle.export.gguf.metadata import as_stored, factor_tensors, figures_of, gguf_family_of, gguf_name
from fettle.export.gguf.tokenizer import name_for, tokenizer_fields
from fettle.export.gguf.types import Position, Quantization, quantization_of, tensor_type
from fettle.files import require_free_space, write_aside
from fettle.models.load import empty_model

ALIGNMENT = 32
"""Bytes; every tensor begins at a multiple of it."""

HEAD_BYTES = 20 * 10**6
"""Upper bound for a file's header: the tokenizer's pieces and merges."""

QUANTIZATION_VERSION = 2
"""Version of ggml's block layouts."""

PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}

Progress = Callable[[int, int], None]
"""Called with the number of weights written so far and in total."""

Importance = Mapping[str, np.ndarray]
"""The importance of each input column, fp32 (columns,), by GGUF tensor name."""


@dataclass(slots=True)
class Slot:
    """One tensor's type, shape and offset in the file."""

    kind: Type
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def write_gguf(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Path],
    *,
    name: str = "model",
    stop_ids: Iterable[int] = (),
    importance: Importance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write one GGUF file per quantization; `files` maps its name (q4_k_m) to the path.

    tensors: (Hugging Face name, weight), in any order, each read once. name: the model's, shown by llama.cpp.
    Raises UserError for an unknown quantization, an existing file, too little disk space, a model or tokenizer that
    GGUF cannot express, or missing tensors; then no file is left under its final name.
    """
    shapes = shapes_of(config)
    plans = {
        Path(path): _plan(shapes, config, quantization_of(kind), importance or {})
        for kind, path in files.items()
    }
    _require_possible(plans)
    entries = _entries(config, tokenizer, name, list(stop_ids))
    with ExitStack() as open_files:
        outputs = []
        for (path, slots), kind in zip(plans.items(), files, strict=True):
            aside = open_files.enter_context(write_aside(path, replace=overwrite))
            begin = _write_head(aside, entries, slots, quantization_of(kind))
            stream = open_files.enter_context(open(aside, "r+b"))
            outputs.append((stream, begin, slots))
        _write_tensors(tensors, config, shapes, outputs, importance or {}, progress)


def shapes_of(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the file, by its GGUF name."""
    names = {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    elif not gguf_family_of(config).has_own_head:
        raise UserError(
            f"llama.cpp runs a {config.model_type} model only with its output head tied to the embedding; in this one "
            "it is not."
        )
    factors = {name: tuple(factor.shape) for name, factor in factor_tensors(config).items()}
    return {gguf_name(name, config): shape for name, shape in names.items()} | factors


def _plan(
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
    quantization: Quantization,
    importance: Importance,
) -> dict[str, Slot]:
    """Choose each tensor's type and its offset after the file's header."""
    slots, offset = {}, 0
    for name, shape in shapes.items():
        place = Position(
            layer=int(name.split(".")[1]) if name.startswith("blk.") else 0,
            layers=config.num_hidden_layers,
            queries_per_key=config.num_attention_heads // config.num_key_value_heads,
            has_importance=bool(importance),
        )
        kind = tensor_type(name, shape, quantization, place, is_tied=config.tie_word_embeddings)
        slots[name] = Slot(kind, shape, offset)
        offset += _aligned(slots[name].bytes)
    return slots


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def require_name(path: Path) -> None:
    """Raise UserError for a name without the .gguf extension."""
    if path.suffix != ".gguf":
        raise UserError(
            f"{option('to')} is {str(path)!r}; expected a name that ends in .gguf, such as model.gguf."
        )


def _require_possible(plans: Mapping[Path, Mapping[str, Slot]]) -> None:
    """Raise UserError if the quantizer or the disk space is missing, before anything is written."""
    if any(slot.kind not in PLAIN for slots in plans.values() for slot in slots.values()):
        library()
    for path in plans:
        require_name(path)
    needed = sum(_aligned(slot.bytes) for slots in plans.values() for slot in slots.values())
    names = ", ".join(path.name for path in plans)
    require_free_space(next(iter(plans)), needed + HEAD_BYTES * len(plans), f"writing {names}")


def _entries(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str, stop_ids: list[int]
) -> dict[str, Any]:
    """Return all metadata of the file except that of the quantization."""
    family = gguf_family_of(config)
    fields = tokenizer_fields(tokenizer, config.vocab_size, stop_ids)
    return {
        "general.type": "model",
        "general.name": name_for(tokenizer, name),
        **{f"{family.architecture}.{key}": value for key, value in figures_of(config).items()},
        **{f"tokenizer.{key}": value for key, value in fields.items()},
    }


def _write_head(
    path: Path, entries: Mapping[str, Any], slots: Mapping[str, Slot], quantization: Quantization
) -> int:
    """Write everything except the tensors' bytes; return the offset of the first of these."""
    architecture = next(key for key in entries if key.endswith(".block_count")).split(".")[0]
    writer = GGUFWriter(str(path), architecture)
    for key, value in entries.items():
        _add(writer, key, value)
    writer.add_file_type(int(quantization.file_type))
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for name, slot in slots.items():
        writer.add_tensor_info(name, slot.shape, np.dtype(np.float32), slot.bytes, raw_dtype=slot.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = _aligned(path.stat().st_size)
    last = max(slots.values(), key=lambda slot: slot.offset)
    with open(path, "r+b") as stream:  # the full size from the start; gaps are zero
        stream.truncate(begin + last.offset + _aligned(last.bytes))
    return begin


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kinds[type(value)])


def _write_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    outputs: Sequence[tuple[BinaryIO, int, Mapping[str, Slot]]],
    importance: Importance,
    progress: Progress | None,
) -> None:
    """Write each tensor to every file; UserError unless each arrives exactly once, in the right shape."""
    missing, done = dict(shapes), 0
    total = sum(math.prod(shape) for shape in shapes.values())
    for name, tensor in _for_file(tensors, config):
        if missing.pop(name, None) != tuple(tensor.shape):
            expected = shapes.get(name, "no such tensor")
            raise UserError(
                f"The tensor {name} has shape {tuple(tensor.shape)}, but the config implies {expected}."
            )
        for stream, begin, slots in outputs:
            stream.seek(begin + slots[name].offset)
            stream.write(_bytes(name, tensor, slots[name].kind, importance).data)
        done += tensor.numel()
        if progress is not None:
            progress(done, total)
    if missing:
        raise UserError(f"{len(missing)} tensors of the model are missing, {next(iter(missing))} among them.")


def _for_file(
    tensors: Iterable[tuple[str, torch.Tensor]], config: PreTrainedConfig
) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the file's tensors by their GGUF names."""
    yield from factor_tensors(config).items()
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield gguf_name(name, config), as_stored(name, tensor.detach().cpu(), config)


def _bytes(name: str, tensor: torch.Tensor, kind: Type, importance: Importance) -> np.ndarray:
    """Return the tensor's bytes in the file, uint8 (rows, bytes)."""
    if kind not in PLAIN:
        return quantize(tensor, kind, importance.get(name))
    cast = tensor.to(PLAIN[kind]).contiguous()
    if kind is Type.F16 and not torch.isfinite(cast).all():
        raise UserError(f"The tensor {name} has values beyond fp16's range (65,504): use bf16 instead.")
    return cast.reshape(-1).view(torch.uint8).numpy()
