"""A frozen linear layer with its matrix in NF4, stored under bitsandbytes' names.

    y = x W^T + bias,    d loss / d x = grad W,    W is dequantized in forward and again in backward

Besides `weight` (uint8, two weights per byte) a state dict has `weight.absmax`, `weight.quant_map`, with double
quantization `weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`: JSON in a
uint8 tensor. transformers with bitsandbytes loads such a checkpoint, and fettle loads theirs.
"""

import json
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fettle.errors import UserError
from fettle.ops.dispatch import product_dtype
from fettle.ops.lora_linear import frozen_linear
from fettle.ops.nf4 import BLOCK, NESTED_BLOCK, TABLE, Nf4, dense, nf4_quantize
from fettle.ops.scratch import dense_weights

STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
_PARTS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE_KEY)


class Nf4Linear(nn.Linear):
    """`weight` is a frozen uint8 parameter; `nf4` is the matrix. An `nn.Linear`, so that PEFT adapts it."""

    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_quant_map: torch.Tensor | None

    def __init__(self, nf4: Nf4, bias: torch.Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = nf4.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._hold(nf4)

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> "Nf4Linear":
        """Quantize a linear layer."""
        return cls(nf4_quantize(layer.weight), None if layer.bias is None else layer.bias.detach())

    @property
    def nf4(self) -> Nf4:
        """Return the matrix as an input of the ops."""
        return Nf4(
            self.weight,
            self.absmax,
            self.shape,
            self.dtype,
            self.nested_absmax,
            self.nested_quant_map,
            self.offset,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., inputs) -> (..., outputs); only x gets a gradient."""
        output: torch.Tensor = _Nf4Linear.apply(x, self.nf4, self.bias)
        return output

    def _hold(self, nf4: Nf4) -> None:
        self.weight = nn.Parameter(nf4.packed, requires_grad=False)
        self.register_buffer("absmax", nf4.absmax, persistent=False)
        self.register_buffer("nested_absmax", nf4.nested_absmax, persistent=False)
        self.register_buffer("nested_quant_map", nf4.nested_quant_map, persistent=False)
        self.shape, self.dtype, self.offset = nf4.shape, nf4.dtype, nf4.offset

    def _apply(self, fn: Any, recurse: bool = True) -> "Nf4Linear":
        """Move with the model; a change of floating-point dtype leaves absmax in fp32."""
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        self.weight.data = fn(self.weight.data)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in to_tensors(self.nf4).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        parts = {name: state_dict.pop(prefix + name) for name in _PARTS if prefix + name in state_dict}
        if STATE_KEY in parts:
            self._hold(from_tensors({**parts, "weight": state_dict[prefix + "weight"]}, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    """Return a linear layer's matrix (outputs, inputs): unchanged, or dequantized into new memory."""
    if isinstance(layer, Nf4Linear):
        return dense(layer.nf4, layer.dtype)
    return layer.weight


def to_tensors(nf4: Nf4) -> dict[str, torch.Tensor]:
    """Return the matrix's tensors under bitsandbytes' names."""
    facts: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(nf4.dtype).removeprefix("torch."),
        "shape": list(nf4.shape),
    }
    tensors = {"weight": nf4.packed, "weight.absmax": nf4.absmax, "weight.quant_map": torch.tensor(TABLE)}
    if nf4.nested_absmax is not None and nf4.nested_quant_map is not None:
        facts |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nf4.offset,
        }
        tensors["weight.nested_absmax"] = nf4.nested_absmax
        tensors["weight.nested_quant_map"] = nf4.nested_quant_map.clone()  # files cannot store shared tensors
    tensors[STATE_KEY] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: dict[str, torch.Tensor], where: str) -> Nf4:
    """Return the matrix from its tensors; raises UserError if they are not NF4 in blocks of 64."""
    try:
        facts = json.loads(bytes(tensors[STATE_KEY].tolist()))
        found = facts["quant_type"], facts["blocksize"], facts.get("nested_blocksize", NESTED_BLOCK)
        if found != ("nf4", BLOCK, NESTED_BLOCK):
            raise UserError(f"{where}: quantized as {found}; expected nf4 in blocks of {BLOCK}.")
        is_nested = "nested_offset" in facts
        nf4 = Nf4(
            tensors["weight"],
            tensors["weight.absmax"],
            torch.Size(facts["shape"]),
            getattr(torch, facts["dtype"]),
            tensors["weight.nested_absmax"] if is_nested else None,
            tensors["weight.nested_quant_map"] if is_nested else None,
            float(facts.get("nested_offset", 0.0)),
        )
        _require_sizes(nf4)
        return nf4
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: its 4-bit weights are incomplete or malformed ({error!r}); fetch the checkpoint again."
        ) from error


def _require_sizes(nf4: Nf4) -> None:
    """Raise ValueError if a part has the wrong length for the matrix: a kernel would read beyond its end."""
    weights = nf4.shape.numel()
    blocks = -(-weights // BLOCK)
    parts = {"weight": (nf4.packed, -(-weights // 2)), "weight.absmax": (nf4.absmax, blocks)}
    if nf4.nested_absmax is not None and nf4.nested_quant_map is not None:
        parts["weight.nested_absmax"] = nf4.nested_absmax, -(-blocks // NESTED_BLOCK)
        parts["weight.nested_quant_map"] = nf4.nested_quant_map, 256
    for name, (part, expected) in parts.items():
        if part.numel() != expected:
            raise ValueError(f"{name} has {part.numel()} entries, not {expected}")
    if nf4.packed.dtype != torch.uint8:
        raise ValueError(f"weight is stored as {nf4.packed.dtype}, not uint8")


class _Nf4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Nf4, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        rows = x.reshape(-1, x.shape[-1])
        dtype = product_dtype(rows, has_gradient=ctx.needs_input_grad[0])
        output = frozen_linear(rows.to(dtype), weight, bias)
        return output.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        dtype = product_dtype(rows)
        with dense_weights([ctx.weight], dtype) as (matrix,):
            grad_x = (rows.to(dtype) @ matrix).to(rows.dtype)
        return grad_x.view(*grads[0].shape[:-1], -1), None, None
