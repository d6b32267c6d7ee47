"""Rotary angles for every scaling the families use, and LongRoPE's choice between two sets of factors.

LongRoPE (Ding et al., 2024, arXiv 2402.13753) has short factors for texts up to the original context
(4,096 tokens for Phi-3.5) and long factors beyond it. Stock transformers decides by the longest position
of the whole forward pass, so the result for a short document depends on the others in its batch. Here:

- `context_tokens` set (a training run, a served context): one choice for every document;
- `context_tokens` None: each packed document decides by its own length, as if it were the only one; an
  unpacked batch decides by its longest position, as in transformers.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fettle.errors import UserError, reason_of
from fettle.models.families import head_dim_of, rotary_dim_of


class DecoderRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles.

    The frequencies are not buffers: they are computed from the config at first use on a device, so a model built on
    the meta device cannot end up with uninitialized ones.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        self.context_tokens: int | None = None
        self._frequencies: dict[tuple[torch.device, bool], tuple[torch.Tensor, float]] = {}

    def require_usable(self, where: str) -> None:
        """Raise UserError, naming the file `where`, for a rope type or values that give no usable frequencies."""
        known = {"default", *ROPE_INIT_FUNCTIONS} - {"dynamic"}
        if not isinstance(self.rope_type, str) or self.rope_type not in known:
            raise UserError(
                f"{where}: rope type '{self.rope_type}' is not supported; "
                "expected default, linear, llama3, yarn or longrope."
            )
        rotary_dim, shown = rotary_dim_of(self.config), _shortened(self.config.rope_parameters)
        theta = self.config.rope_parameters.get("rope_theta", 1.0)
        if isinstance(theta, bool) or theta == math.inf:
            raise UserError(f"{where}: rope_theta is {theta}; expected a number above 0.")
        try:
            tables = [self._table(torch.device("cpu"), is_long=is_long)[0] for is_long in self._choices]
        except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
            raise UserError(
                f"{where}: its rope parameters {shown} give no rotary frequencies: {reason_of(error)}."
            ) from error
        is_whole = all(table.isfinite().all() and 2 * len(table) == rotary_dim for table in tables)
        if not is_whole or rotary_dim > head_dim_of(self.config):
            raise UserError(
                f"{where}: its rope parameters {shown} do not fit heads of "
                f"{head_dim_of(self.config)} channels; fetch the model's own config.json."
            )

    @property
    def _choices(self) -> tuple[bool, ...]:
        """The values of `is_long` to build tables for: short only, or short and long for LongRoPE."""
        return (False, True) if self.rope_type == "longrope" else (False,)

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, document_lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, (batch, tokens, rotary_dim), in x's dtype.

        position_ids: (batch, tokens). document_lengths: (batch, tokens), the length of each token's document.
        """
        frequencies, scaling = self._frequencies_for(x.device, position_ids, document_lengths)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)

    def changes_factors(self, seen_tokens: int, tokens: int) -> bool:
        """Whether a text of `seen_tokens` gets different factors when it grows to `tokens`."""
        return seen_tokens > 0 and self.factors_for(seen_tokens) != self.factors_for(tokens)

    def factors_for(self, tokens: int) -> tuple[bool, float]:
        """Return whether a text of `tokens` gets LongRoPE's long factors, and up to how many tokens that holds."""
        if self.rope_type != "longrope":
            return False, math.inf
        original: int = self.config.rope_parameters["original_max_position_embeddings"]
        is_long = (self.context_tokens or tokens) > original
        return is_long, original if self.context_tokens is None and not is_long else math.inf

    def _frequencies_for(
        self, device: torch.device, position_ids: torch.Tensor, document_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        short, scaling = self._table(device, is_long=False)
        if self.rope_type != "longrope":
            return short, scaling
        long, _ = self._table(device, is_long=True)
        original = self.config.rope_parameters["original_max_position_embeddings"]
        if self.context_tokens is not None:
            return (long if self.context_tokens > original else short), scaling
        tokens = position_ids.max() + 1 if document_lengths is None else document_lengths[..., None]
        return torch.where(tokens > original, long, short), scaling

    def _table(self, device: torch.device, *, is_long: bool) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies, fp32 (rotary_dim / 2,), and the factor on cos and sin."""
        key = (device, is_long)
        if key not in self._frequencies:
            self._frequencies[key] = self._compute(device, is_long)
        return self._frequencies[key]

    def _compute(self, device: torch.device, is_long: bool) -> tuple[torch.Tensor, float]:
        parameters = self.config.rope_parameters
        if self.rope_type == "default":
            rotary_dim = rotary_dim_of(self.config)
            exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
            return (1.0 / parameters["rope_theta"] ** exponents).to(device), 1.0
        tokens = parameters["original_max_position_embeddings"] + 1 if is_long else None
        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](
            self.config, torch.device("cpu"), seq_len=tokens
        )
        return frequencies.float().to(device), scaling


def _shortened(parameters: dict[str, Any]) -> str:
    """Return rope parameters for a message, without LongRoPE's long lists of factors."""
    shown = {
        name: f"{len(each)} numbers" if isinstance(each, list) else each for name, each in parameters.items()
    }
    return str(shown)
