"""The sizes of a model, computed from its config only, from which the plan counts memory and time.

Letters: E hidden size, I intermediate size, H heads, K key-value heads, D channels per head, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fettle.models.families import FAMILIES, FUSED_ACTIVATIONS, Family, head_dim_of, option, sliding_window_of

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
        """Return the shapes of a model from the config of a supported family."""
        family = FAMILIES[config.model_type]
        hidden, intermediate = config.hidden_size, config.intermediate_size
        size = head_dim_of(config)
        query, key = config.num_attention_heads * size, config.num_key_value_heads * size
        has_bias = bool(option(config, "attention_bias", False))
        vectors = hidden * (4 if family.has_sandwich_norms else 2) + (2 * size if family.has_qk_norm else 0)
        vectors += query + 2 * key if has_bias or family.has_qkv_bias else 0
        vectors += hidden if has_bias else 0
        has_mlp_bias = bool(option(config, "mlp_bias", False))
        vectors += 2 * intermediate + hidden if has_mlp_bias else 0
        activation = option(config, "hidden_activation") or config.hidden_act
        table = config.vocab_size * hidden
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=config.num_attention_heads,
            query=query,
            key=key,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            windows=tuple(sliding_window_of(config, i) for i in range(config.num_hidden_layers)),
            matrices=_matrices(family, hidden, intermediate, query, key),
            vectors=vectors,
            outer=hidden + table * (1 if config.tie_word_embeddings else 2),
            embedding=0 if config.tie_word_embeddings else table,
            head=table,
            has_sandwich_norms=family.has_sandwich_norms,
            has_qk_norm=family.has_qk_norm,
            has_whole_mlp=not has_mlp_bias and activation in FUSED_ACTIVATIONS,
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


def _matrices(
    family: Family, hidden: int, intermediate: int, query: int, key: int
) -> dict[str, tuple[int, int]]:
    down = {"o_proj": (hidden, query), "down_proj": (hidden, intermediate)}
    if family.has_fused_projections:
        return {"qkv_proj": (query + 2 * key, hidden), "gate_up_proj": (2 * intermediate, hidden)} | down
    return {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
    } | down
