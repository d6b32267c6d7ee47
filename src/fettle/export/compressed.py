"""Export folders with quantized weights in the compressed-tensors format, for vLLM and transformers.

- fp8: weights in float8 (e4m3) with one scale per row; activations are quantized per token at run time.
- w4a16: weights in four bits with one scale per 128 inputs, rounded by GPTQ on the user's own rows.

The output head, the embedding and the norms are not quantized, nor is a matrix whose width is not a multiple of the
four-bit group size.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from torch import nn
from transformers import PreTrainedTokenizerBase

from fettle.errors import UserError, option
from fettle.events import Message, Report
from fettle.export.calibration import CalibrationRows, curvatures_by_layer, first_rows, mean_loss, split
from fettle.export.checkpoint import Packing, export_folder, require_place, require_room
from fettle.export.merge import load_merged, write_down_context
from fettle.export.source import open_source
from fettle.files import replace_folder, write_aside
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.save import save_model
from fettle.quantization.gptq import GROUP, gptq
from fettle.quantization.layers import HEAD, plain_linears

E4M3 = torch.float8_e4m3fn
FOUR_BITS_BYTES = 0.52
"""Bytes per weight on disk, including scales."""

Stored = dict[str, torch.Tensor]
"""A layer's tensors under their names in the format."""


def export_fp8(name: str, to: Path, *, data: str | None, report: Report, overwrite: bool = False) -> Path:
    """Write the model that `name` refers to into the new folder `to`, one tensor at a time.

    With data the whole model is loaded first, and the loss on held-out rows before and after is reported. Raises
    UserError for faults that the user can fix.
    """
    if data is not None:
        model, _, rows = _opened(name, to, data, FP8.weight_bytes, overwrite)
        before = _loss_before(model, rows, name)
        for linear in plain_linears(model).values():
            linear.weight.data = dense(in_fp8(linear.weight.data))
        _tell_loss(before, mean_loss(model, rows.held_out), report)
        del model
    return export_folder(name, to, packing=FP8, overwrite=overwrite)


def export_four_bits(name: str, to: Path, *, data: str, report: Report, overwrite: bool = False) -> Path:
    """Write the model in four bits, calibrated on rows of `data`; with the whole model in memory."""
    model, tokenizer, rows = _opened(name, to, data, FOUR_BITS_BYTES, overwrite)
    if all(linear.in_features % GROUP for linear in plain_linears(model).values()):
        raise UserError(
            f"{name}: w4a16 quantizes inputs in groups of {GROUP}, which divides the width of none of its matrices; "
            f"use {option('format')} fp8 or nf4."
        )
    before = _loss_before(model, rows, name)
    stored, narrow = _in_four_bits(model, rows.calibration, report)
    _tell_loss(before, mean_loss(model, rows.held_out), report)
    _replace(model, stored)
    model.config.quantization_config = _config("W4A16", "pack-quantized", [HEAD, *narrow])
    with replace_folder(to) if overwrite else write_aside(to) as aside:
        save_model(model, tokenizer, aside)
    return to


def _opened(
    name: str, to: Path, data: str, matrix_bytes: float, overwrite: bool
) -> tuple[DecoderForCausalLM, PreTrainedTokenizerBase, CalibrationRows]:
    """Load the merged model and tokenize the rows, after checking everything that could make the export fail."""
    require_place(to, overwrite)
    given, source = first_rows(data), open_source(name)
    rows = split(given, source.tokenizer)
    require_room(to, source, matrix_bytes)
    model, tokenizer = load_merged(source.ref)
    write_down_context(model.config, model.model.rotary_emb.context_tokens)
    model.generation_config = source.generation
    return model, tokenizer, rows


def _loss_before(model: DecoderForCausalLM, rows: CalibrationRows, name: str) -> float:
    """Return the loss on the held-out rows; UserError if it is NaN or Inf, as calibration would be meaningless."""
    loss = mean_loss(model, rows.held_out)
    if not math.isfinite(loss):
        raise UserError(
            f"{name}: its loss on rows of {option('data')} is {loss}: its weights contain NaN or Inf, or its "
            "activations overflow; nothing was written."
        )
    return loss


def _tell_loss(before: float, after: float, report: Report) -> None:
    change = after - before
    report(Message(f"loss on held-out rows: {before:.4f} before, {after:.4f} after ({change:+.4f})"))


@torch.no_grad()
def in_fp8(weight: torch.Tensor) -> Stored:
    """Return the weight (rows, columns) in e4m3, with one scale per row (rows, 1)."""
    largest = weight.float().abs().amax(1, keepdim=True)
    scale = (largest / torch.finfo(E4M3).max).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    codes = (weight.float() / scale.float()).clamp(-torch.finfo(E4M3).max, torch.finfo(E4M3).max).to(E4M3)
    return {"weight": codes, "weight_scale": scale}


def dense(stored: Stored) -> torch.Tensor:
    """Return the matrix that `in_fp8` represents, in its scales' dtype."""
    scale = stored["weight_scale"]
    return (stored["weight"].float() * scale.float()).to(scale.dtype)


def _in_four_bits(
    model: DecoderForCausalLM, calibration: Sequence[torch.Tensor], report: Report
) -> tuple[dict[str, Stored], list[str]]:
    """Quantize layer by layer, each calibrated on the outputs of the quantized layers before it."""
    stored: dict[str, Stored] = {}
    narrow: list[str] = []
    for number, curvatures in enumerate(curvatures_by_layer(model, calibration)):
        for name, curvature in curvatures.items():
            full = f"model.layers.{number}.{name}"
            linear = model.get_submodule(full)
            assert isinstance(linear, nn.Linear)
            if linear.in_features % GROUP:
                narrow.append(full)
                text = f"its {linear.in_features} inputs are not a multiple of {GROUP}"
                report(Message(f"{full} is not quantized: {text}"))
                continue
            found = gptq(linear.weight.data, curvature, linear.weight.dtype)
            linear.weight.data.copy_(found.dense())
            stored[full] = {
                "weight_packed": pack_to_int32(found.codes, 4),
                "weight_scale": found.scales,
                "weight_shape": torch.tensor(linear.weight.shape),
            }
    return stored, narrow


def _replace(model: DecoderForCausalLM, stored: dict[str, Stored]) -> None:
    """Replace each linear layer by a module with the stored tensors as buffers, which are saved under its name."""
    for name, tensors in stored.items():
        linear = model.get_submodule(name)
        bare = nn.Module()
        for leaf, tensor in tensors.items():
            bare.register_buffer(leaf, tensor)
        if linear.bias is not None:
            bare.register_buffer("bias", linear.bias.data)
        model.set_submodule(name, bare)


def _config(preset: str, form: str, left_out: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        format=form,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=left_out,
    ).to_dict()
    return found | {"quantization_status": "compressed"}


FP8 = Packing(
    parts=in_fp8,
    config=lambda dtype: _config("FP8_DYNAMIC", "float-quantized", [HEAD]),
    weight_bytes=1.01,
)
