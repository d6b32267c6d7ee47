"""Folders with compressed weights in the field's own layout (compressed-tensors), for vLLM and transformers.

- fp8: weights in float8 (e4m3) with a scale a row; activations are scaled token by token as they come.
- w4a16: weights in four bits with a scale for 128 inputs, rounded by GPTQ on rows of the user's own.

The output head, the embedding and the norms stay as they are, and so does a matrix whose width four-bit groups do not
divide.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from torch import nn

from fettle.export.calibration import curvatures_by_layer, first_rows, mean_loss, split
from fettle.export.checkpoint import merged_model
from fettle.files import write_aside
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.save import save_model
from fettle.quantization.gptq import GROUP, gptq
from fettle.quantization.layers import HEAD, plain_linears

FP8 = torch.float8_e4m3fn
LAYOUTS = {"fp8": ("FP8_DYNAMIC", "float-quantized"), "w4a16": ("W4A16", "pack-quantized")}
MATRIX_BYTES = {"fp8": 1.01, "w4a16": 0.52}
"""A weight's on disk, its share of the scales included."""

Stored = dict[str, torch.Tensor]
"""A layer's tensors under the layout's names."""


def export_compressed(
    name: str,
    to: Path,
    layout: str,
    *,
    data: str | None,
    report: Callable[[str], None],
) -> Path:
    """Write the model that `name` stands for into the new folder `to`.

    layout: "fp8" or "w4a16"; the latter needs data, to calibrate on. With data the loss on a part that was not
    calibrated on is told before and after. Raises UserError for what the user can mend.
    """
    rows = None if data is None else first_rows(data)  # before anything long: it may not be readable
    model, tokenizer = merged_model(name, to, "auto", matrix_bytes=MATRIX_BYTES[layout])
    known = None if rows is None else split(rows, tokenizer)
    before = None if known is None else mean_loss(model, known.held_out)
    left_out = [HEAD]
    if layout == "fp8":
        stored = {each: in_fp8(linear) for each, linear in plain_linears(model).items()}
    else:
        assert known is not None
        stored, narrow = _in_four_bits(model, known.calibration, report)
        left_out += narrow
    if before is not None and known is not None:
        after = mean_loss(model, known.held_out)
        report(
            f"loss on rows that were not calibrated on: {before:.4f} before, {after:.4f} after ({after - before:+.4f})"
        )
    _replace(model, stored)
    model.config.quantization_config = _config(layout, left_out)
    with write_aside(to) as aside:
        save_model(model, tokenizer, aside)
    return to


@torch.no_grad()
def in_fp8(linear: nn.Linear) -> Stored:
    """Rounded, and left in the model as what it now stands for."""
    weight = linear.weight.data
    largest = weight.float().abs().amax(1, keepdim=True)
    scale = (largest / torch.finfo(FP8).max).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
    codes = (weight.float() / scale.float()).clamp(-torch.finfo(FP8).max, torch.finfo(FP8).max).to(FP8)
    weight.copy_(codes.float() * scale.float())
    return {"weight": codes, "weight_scale": scale}


def _in_four_bits(
    model: DecoderForCausalLM, calibration: Sequence[torch.Tensor], report: Callable[[str], None]
) -> tuple[dict[str, Stored], list[str]]:
    """Layer by layer, each calibrated on what the rounded layers before it give."""
    stored: dict[str, Stored] = {}
    narrow: list[str] = []
    for number, curvatures in enumerate(curvatures_by_layer(model, calibration)):
        for name, curvature in curvatures.items():
            full = f"model.layers.{number}.{name}"
            linear = model.get_submodule(full)
            assert isinstance(linear, nn.Linear)
            if linear.in_features % GROUP:
                narrow.append(full)
                report(f"{full} keeps its type: its {linear.in_features} inputs are no multiple of {GROUP}")
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
    """Put a layer of bare tensors in the place of each linear one, so that they are saved under its name."""
    for name, tensors in stored.items():
        linear = model.get_submodule(name)
        bare = nn.Module()
        for leaf, tensor in tensors.items():
            bare.register_buffer(leaf, tensor)
        if linear.bias is not None:
            bare.register_buffer("bias", linear.bias.data)
        model.set_submodule(name, bare)


def _config(layout: str, left_out: list[str]) -> dict[str, Any]:
    preset, form = LAYOUTS[layout]
    found: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        format=form,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=left_out,
    ).to_dict()
    return found | {"quantization_status": "compressed"}
