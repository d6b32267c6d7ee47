"""Export a model, with its adapter merged, as a Hugging Face folder for transformers, vLLM and others."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fettle.checkpoints.dtypes import Dtype, name_of
from fettle.errors import UserError, option
from fettle.export.shards import ShardWriter
from fettle.export.source import Source, open_source
from fettle.files import replace_folder, require_free_space, require_new_folder, write_aside
from fettle.models.load import empty_model
from fettle.models.quantized import nf4_config
from fettle.models.save import save_around_weights
from fettle.ops.nf4 import nf4_quantize
from fettle.quantization.layers import HEAD, plain_linears
from fettle.quantization.nf4 import to_tensors

TOKENIZER_BYTES = 20 * 10**6
"""Upper bound for everything except the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A quantized storage format for the layers' matrices.

    parts: converts a matrix to its stored tensors, by their names in the layer. config: returns the
    quantization_config for a model of that dtype. weight_bytes: bytes per weight on disk, including scales.
    """

    parts: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    config: Callable[[torch.dtype], dict[str, Any]]
    weight_bytes: float


NF4 = Packing(parts=lambda weight: to_tensors(nf4_quantize(weight)), config=nf4_config, weight_bytes=0.52)
LARGEST_PARTS = 6
"""Upper bound for the tensors of a packed matrix."""


def export_safetensors(name: str | Path, to: Path, *, dtype: Dtype = "auto", overwrite: bool = False) -> Path:
    """Write the full model that `name` refers to into the new folder `to` and return it.

    An adapter is merged into its base, one matrix in memory at a time. If it was trained beyond LongRoPE's original
    context, the merged model has the long factors at every length. The folder is written completely (weights, config,
    generation config, tokenizer, chat template) or not at all. overwrite: replace an existing model folder, once the
    new one is complete.
    """
    return export_folder(name, Path(to), dtype=dtype, overwrite=overwrite)


def export_nf4(name: str | Path, to: Path, *, dtype: Dtype = "auto", overwrite: bool = False) -> Path:
    """Like `export_safetensors`, with the layers' matrices in NF4; transformers and vLLM load it with bitsandbytes."""
    return export_folder(name, Path(to), dtype=dtype, packing=NF4, overwrite=overwrite)


def export_folder(
    name: str | Path,
    to: Path,
    *,
    dtype: Dtype = "auto",
    packing: Packing | None = None,
    overwrite: bool = False,
) -> Path:
    """Like `export_safetensors`, with the layers' matrices in the format `packing`. Raises UserError for faults that
    the user can fix, before anything is written."""
    require_place(to, overwrite)
    source = open_source(name)
    if dtype != "auto":
        source.dtype = getattr(torch, dtype)
    require_room(to, source, source.dtype.itemsize if packing is None else packing.weight_bytes)
    with replace_folder(to) if overwrite else write_aside(to) as aside:
        aside.mkdir()
        _write_weights(source, aside, packing)
        source.config.dtype = name_of(source.dtype)
        if packing is not None:
            source.config.quantization_config = packing.config(source.dtype)
        save_around_weights(source.config, source.generation, source.tokenizer, aside)
    return to


def _write_weights(source: Source, folder: Path, packing: Packing | None) -> None:
    model = empty_model(source.config)
    packed = set() if packing is None else {f"{layer}.weight" for layer in plain_linears(model)}
    with ShardWriter(folder, tensors=LARGEST_PARTS * len(model.state_dict())) as shards:
        for name, tensor in source.tensors():
            if name == f"{HEAD}.weight" and source.config.tie_word_embeddings:
                continue
            tensor = _cast(name, tensor, source.dtype)
            parts = packing.parts(tensor) if packing is not None and name in packed else {"weight": tensor}
            layer = name.removesuffix("weight")
            for leaf, part in parts.items():
                shards.add(layer + leaf if name.endswith("weight") else name, part)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor in the dtype to be written. UserError if a value overflows fp16."""
    found = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not found.isfinite().all():
        raise UserError(
            f"The tensor {name} has values beyond fp16's range (65,504); nothing was written: "
            f"use {option('dtype')} bfloat16."
        )
    return found


def require_place(to: Path, overwrite: bool) -> None:
    """Raise UserError if the folder `to` must not be written, whatever the model."""
    if Path.cwd().is_relative_to(to.resolve()):
        raise UserError(
            f"{option('to')} is {str(to)!r}, which contains the current directory: choose another folder."
        )
    require_new_folder(to, "the exported model", replace=overwrite)


def require_room(to: Path, source: Source, matrix_bytes: float) -> None:
    """Raise UserError if the model is read from the folder `to`, or if there is too little disk space.

    matrix_bytes: bytes per weight of the layers' matrices.
    """
    if to.is_dir() and any(to.samefile(path) for path in source.ref.paths):
        raise UserError(f"{option('to')} is {to}, which the model is read from: choose another folder.")
    model, size = empty_model(source.config), source.dtype.itemsize
    weights = sum(each.numel() for each in model.parameters())
    inside = sum(linear.weight.numel() for linear in plain_linears(model).values())
    needed = weights * size + inside * (matrix_bytes - size)
    require_free_space(to, int(needed) + TOKENIZER_BYTES, "the exported model")
