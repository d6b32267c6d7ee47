"""The sizes of a model, from which the plan counts memory and time: read off one of its layers on the meta device.

The layer is the decoder's own, so a family needs no formulas here. Building it takes milliseconds.

Letters: E hidden size, I intermediate size, H heads, K key-value heads, D channels per head, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fettle.models.families import FAMILIES, option, sliding_window_of
from fettle.models.layer import DecoderLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a model.

    hidden: E. intermediate: I. heads: H. query: H * D. key: K * D. vocabulary: V. context: in tokens. windows: sliding
    window per layer in tokens, None for full attention. matrices: the linear layers of one decoder layer, name ->
    (outputs, inputs). vectors: elements of one layer outside the matrices. outer: elements outside the layers, which
    include embedding, V * E or 0 if it is tied to the head, and head, V * E. has_whole_mlp: `lora_mlp` can run the MLP
    as one function. caps_logits: the final logits are softcapped.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key: int
    vocabulary: int
    context: int
    windows: tuple[int | None, ...]
    matrices: dict[str, tuple[int, int]]
    vectors: int
    outer: int
    embedding: int
    head: int
    has_sandwich_norms: bool
    has_qk_norm: bool
    has_whole_mlp: bool
    caps_logits: bool

    @classmethod
    def of(cls, config: "PreTrainedConfig") -> "Shapes":
        """Return the shapes of a model from the config of a supported family: all layers are shaped like the first."""
        with torch.device("meta"):
            layer = DecoderLayer(config, FAMILIES[config.model_type], 0).requires_grad_(False)
        attention, modules = layer.self_attn, layer.named_modules()
        linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
        matrices = {name.rpartition(".")[2]: linear.weight for name, linear in linears.items()}
        weights = sum(matrix.numel() for matrix in matrices.values())
        table = config.vocab_size * config.hidden_size
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=layer.mlp.down_proj.in_features,
            heads=attention.heads,
            query=attention.heads * attention.head_dim,
            key=attention.key_value_heads * attention.head_dim,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            windows=tuple(sliding_window_of(config, i) for i in range(config.num_hidden_layers)),
            matrices={name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()},
            vectors=sum(each.numel() for each in layer.parameters()) - weights,
            outer=config.hidden_size + table * (1 if config.tie_word_embeddings else 2),
            embedding=0 if config.tie_word_embeddings else table,
            head=table,
            has_sandwich_norms=layer.has_sandwich_norms,
            has_qk_norm=attention.has_qk_norm,
            has_whole_mlp=layer.mlp.as_function() is not None,
            caps_logits=option(config, "final_logit_softcapping") is not None,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer."""
        return sum(outputs * inputs for outputs, inputs in self.matrices.values())

    @property
    def parameters(self) -> int:
        """Elements of the whole model."""
        return self.layers * (self.layer_weights + self.vectors) + self.outer

    def adapter_parameters(self, rank: int, targets: Mapping[str, int] | None) -> int:
        """Return the elements of LoRA adapters.

        targets: matrix -> in how many layers; None: all matrices of all layers.
        """
        counts = self._adapted(targets)
        adapted = [(counts.get(name, 0), sum(shape)) for name, shape in self.matrices.items()]
        return rank * sum(layers * sides for layers, sides in adapted)

    def adapter_tensors(self, targets: Mapping[str, int] | None) -> int:
        """Return the number of adapter tensors: A and B for each adapted matrix."""
        return 2 * sum(self._adapted(targets).values())

    def _adapted(self, targets: Mapping[str, int] | None) -> Mapping[str, int]:
        return dict.fromkeys(self.matrices, self.layers) if targets is None else targets
