"""Calibration on real rows: the inputs' curvatures for GPTQ, layer by layer, and the loss on held-out rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fettle.data import Row, read_rows, tokenize_rows
from fettle.errors import UserError, option
from fettle.models.attention_context import PackedDocuments
from fettle.models.decoder import DecoderForCausalLM

SAMPLES, HELD_OUT = 128, 16
LENGTH = 512
"""Tokens per row; longer rows are truncated."""


@dataclass(frozen=True, slots=True)
class CalibrationRows:
    """Rows of ids, each (1, tokens)."""

    calibration: list[torch.Tensor]
    held_out: list[torch.Tensor]


def first_rows(data: str | Path) -> list[Row]:
    """Return the first rows of the data, as many as are used. UserError if it cannot be read."""
    return read_rows(str(data))[: SAMPLES + HELD_OUT]


def split(given: list[Row], tokenizer: PreTrainedTokenizerBase) -> CalibrationRows:
    """Return the rows as ids; every eighth, up to HELD_OUT, is held out. Raises UserError if there are too few."""
    examples = tokenize_rows(given, tokenizer, max_length=LENGTH).examples
    rows = [torch.tensor([each.input_ids]) for each in examples if len(each.input_ids) > 1]
    if len(rows) < 2:
        raise UserError(
            f"{option('data')}: {len(rows)} of {len(given)} rows are usable; calibration needs at least 2, "
            "preferably 100."
        )
    held_out = rows[::8][:HELD_OUT] if len(rows) >= 8 else rows[:1]
    apart = {id(row) for row in held_out}
    return CalibrationRows([row for row in rows if id(row) not in apart], held_out)


@torch.no_grad()
def mean_loss(model: DecoderForCausalLM, rows: Sequence[torch.Tensor]) -> float:
    """Return the mean loss per token, in nats."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=row.to(model.device), use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, row[0, 1:].to(logits.device), reduction="sum"))
        count += row.shape[1] - 1
    return total / count


@torch.no_grad()
def curvatures_by_layer(
    model: DecoderForCausalLM, rows: Sequence[torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield layer by layer X^T X, fp32 (inputs, inputs), of each linear layer's inputs X, by name.

    The caller may change the layer before it asks for the next: the next layer's inputs are those of the changed one.
    """
    decoder = model.model
    states = [decoder.embed(row.to(model.device), None) for row in rows]
    for layer in decoder.layers:
        seen = _Seen()
        hooks = [
            each.register_forward_pre_hook(partial(seen.add, name))
            for name, each in layer.named_modules()
            if isinstance(each, nn.Linear)
        ]
        for state in states:
            _run(model, layer, state)
        for hook in hooks:
            hook.remove()
        yield {name: seen.sums[first] for name, first in seen.first.items()}
        for number, state in enumerate(states):
            states[number] = _run(model, layer, state)


class _Seen:
    """X^T X of the linear layers' inputs in one layer. Those with the same input (q, k and v; gate and up) share it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.first: dict[str, str] = {}
        """From a linear layer's name to the first one with the same input."""
        self._last: tuple[torch.Tensor, str] | None = None

    def add(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._last is not None and self._last[0] is inputs[0]:
            self.first[name] = self._last[1]
            return
        self._last, self.first[name] = (inputs[0], name), name
        x = inputs[0].flatten(0, -2).float()
        if name not in self.sums:
            self.sums[name] = x.new_zeros(x.shape[1], x.shape[1])
        self.sums[name].addmm_(x.T, x)


def _run(model: DecoderForCausalLM, layer: nn.Module, state: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer(state, PackedDocuments.of_rows(model.model.rotary_emb, state))
    return found
