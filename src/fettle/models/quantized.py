"""Load models with their layers' matrices in NF4: quantized while loading, or already stored so.

One tensor at a time is read, quantized and freed, so that memory never holds more than the quantized model and one
tensor. The files are read, not mapped, as mapped pages would count as memory of this process. Only the token embedding
is mapped, if a CPU can use it as it is stored: few of its pages are ever touched.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fettle.checkpoints.dtypes import SAFETENSORS, name_of
from fettle.checkpoints.folder import Checkpoint, is_nf4
from fettle.checkpoints.safetensors_header import TensorPlace, read_places
from fettle.errors import UserError
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.device import maps_embedding
from fettle.models.offloaded_embedding import OffloadedEmbedding
from fettle.models.rope import DecoderRotaryEmbedding
from fettle.models.save import save_model
from fettle.ops.nf4 import Nf4, nf4_quantize
from fettle.quantization.nf4 import STATE_KEY, Nf4Linear, from_tensors
from fettle.recompute.allocator import restored_heap, set_heap

TABLE = "model.embed_tokens.weight"


def load_nf4(
    checkpoint: Checkpoint, config: Any, dtype: torch.dtype, device: torch.device
) -> DecoderForCausalLM:
    """Return the model with NF4 layers; everything except the layers' matrices is in `dtype`.

    Raises UserError if a stored matrix has an unsupported NF4 layout.
    """
    with torch.device("meta"):
        model = causal_lm_class(config.model_type)(config).to(dtype)
    model.model.rotary_emb = DecoderRotaryEmbedding(config).to(device)  # computed, not stored
    stored = StoredTensors(checkpoint, device)
    if maps_embedding(config, stored.dtype(TABLE), dtype, device):
        _map_embedding(model, stored, dtype)
    with restored_heap():
        set_heap("return")
        for name, module in list(model.model.named_modules(prefix="model")):
            if isinstance(module, nn.Linear) and _becomes_nf4(name, checkpoint):
                model.set_submodule(name, _nf4_layer(name, module, stored, dtype))
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta and name in stored.places:
                _assign(model, name, stored.read(name).to(dtype))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def save_nf4(model: DecoderForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model with NF4 layers into `folder`, in the layout that transformers and bitsandbytes load."""
    model.config.quantization_config = nf4_config(model.dtype)
    save_model(model, tokenizer, folder)


def nf4_config(dtype: torch.dtype) -> dict[str, Any]:
    """Return the quantization_config of a model with NF4 layers and everything else in `dtype`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": name_of(dtype),
        "llm_int8_skip_modules": ["lm_head"],
    }


class StoredTensors:
    """The tensors of a checkpoint, read one at a time, each into its own memory."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.files = checkpoint.tensor_files
        self.device = device
        self.places: dict[str, TensorPlace] = {}
        for file in checkpoint.weight_files:
            self.places |= read_places(file)

    def dtype(self, name: str) -> torch.dtype:
        kind = self.places[name].header.dtype
        if kind not in SAFETENSORS:
            raise UserError(f"{self.files[name]}: '{name}' is of type {kind}; expected F32, BF16, F16 or U8.")
        return SAFETENSORS[kind]

    def read(self, name: str) -> torch.Tensor:
        place, file, dtype = self.places[name], self.files[name], self.dtype(name)
        content = torch.empty(place.end - place.start, dtype=torch.uint8)
        with open(file, "rb") as stream:
            stream.seek(place.start)
            done = 0
            while done < content.numel():  # one call reads 2 GB at most
                done += stream.readinto(content[done:].numpy())  # type: ignore[arg-type]
        return content.view(dtype).view(place.header.shape).to(self.device)

    def is_nf4(self, layer: str) -> bool:
        """Whether the matrix of a linear layer is stored in NF4."""
        return f"{layer}.{STATE_KEY}" in self.places

    def nf4(self, layer: str) -> tuple[Nf4, str]:
        """Return the NF4 matrix of a layer, whose parts may be in several files, and its location for messages."""
        names = [each for each in self.places if each.startswith(f"{layer}.weight")]
        where = f"{self.files[names[0]]}: '{layer}.weight'"
        return from_tensors({each.removeprefix(f"{layer}."): self.read(each) for each in names}, where), where


def _map_embedding(model: DecoderForCausalLM, stored: StoredTensors, dtype: torch.dtype) -> None:
    """Map the token embedding from its file, if it is aligned there."""
    place = stored.places[TABLE]
    if place.start % dtype.itemsize == 0:
        model.model.embed_tokens = OffloadedEmbedding.mapped(
            stored.files[TABLE], place.start, place.header.shape, dtype, model.config.pad_token_id
        )


def _becomes_nf4(layer: str, checkpoint: Checkpoint) -> bool:
    """Whether the layer is in NF4: all are for a plain checkpoint, and those stored so for a quantized one."""
    return not is_nf4(checkpoint) or f"{layer}.{STATE_KEY}" in checkpoint.tensors


def _nf4_layer(name: str, linear: nn.Linear, stored: StoredTensors, dtype: torch.dtype) -> Nf4Linear:
    bias = None if linear.bias is None else stored.read(f"{name}.bias").to(dtype)
    if not stored.is_nf4(name):
        nf4 = nf4_quantize(stored.read(f"{name}.weight").to(dtype))
        if not math.isfinite(nf4.offset):
            raise UserError(
                f"{stored.files[f'{name}.weight']}: '{name}.weight' contains NaN or Inf; fetch the checkpoint again."
            )
        return Nf4Linear(nf4, bias)
    nf4, where = stored.nf4(name)
    if nf4.shape != linear.weight.shape:
        raise UserError(
            f"{where} has shape {tuple(nf4.shape)}, but config.json implies {tuple(linear.weight.shape)}; "
            "the weights and config.json belong to different models."
        )
    return Nf4Linear(nf4, bias)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
