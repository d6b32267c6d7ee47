"""Load the model that `generate` and `chat` answer with."""

from typing import Any

import psutil
from peft import PeftModel
from transformers import PreTrainedModel

from fettle.engine.load import load
from fettle.engine.text import Engine
from fettle.quantization.layers import dequantize_linears
from fettle.quantization.nf4 import Nf4Linear

SHARE = 0.5
"""Of the free memory, for matrices that are dequantized once."""


def open_engine(options: dict[str, Any]) -> Engine:
    """Return the engine for the options of `add_model`."""
    model, tokenizer = load(options["model"], dtype=options["dtype"], device=options["device"])
    if isinstance(model, PreTrainedModel | PeftModel) and model.device.type == "cpu":
        _dequantize_if_room(model)
    return Engine(model, tokenizer)


def _dequantize_if_room(model: PreTrainedModel | PeftModel) -> None:
    """Replace NF4 matrices by dense ones: PyTorch has no NF4 product for CPUs, so each token would dequantize."""
    layers = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    size = sum(each.in_features * each.out_features * each.dtype.itemsize for each in layers)
    if 0 < size <= SHARE * psutil.virtual_memory().available:
        dequantize_linears(model)
