"""The sizes of a model, from its config alone: what the plan counts with.

Letters: E hidden size, I intermediate size, H heads, K key-value heads, D channels a head, V vocabulary.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from fettle.models.families import Family, head_dim_of, option, sliding_window_of


@dataclass(frozen=True, slots=True)
class Shapes:
    """matrices: the linear layers of one decoder layer, name -> (outputs, inputs). windows: of each layer, in
    tokens; None sees everything. vectors: elements of a layer outside the matrices. outer: elements outside
    the layers; head: those of the output head, among them."""

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
    head: int
    has_sandwich_norms: bool
    has_qk_norm: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, family: Family) -> "Shapes":
        """Read them off a family's config."""
        hidden, intermediate = config.hidden_size, config.intermediate_size
        size = head_dim_of(config)
        query, key = config.num_attention_heads * size, config.num_key_value_heads * size
        has_bias = bool(option(config, "attention_bias", False))
        vectors = hidden * (4 if family.has_sandwich_norms else 2) + (2 * size if family.has_qk_norm else 0)
        vectors += query + 2 * key if has_bias or family.has_qkv_bias else 0
        vectors += hidden if has_bias else 0
        vectors += 2 * intermediate + hidden if option(config, "mlp_bias", False) else 0
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
            head=table,
            has_sandwich_norms=family.has_sandwich_norms,
            has_qk_norm=family.has_qk_norm,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer."""
        return sum(outputs * inputs for outputs, inputs in self.matrices.values())

    @property
    def parameters(self) -> int:
        """Elements of the whole model."""
        return self.layers * (self.layer_weights + self.vectors) + self.outer

    def adapter_parameters(self, rank: int, targets: list[str] | None) -> int:
        """Elements of LoRA adapters on the named matrices of every layer; None: on all of them."""
        adapted = [s for name, s in self.matrices.items() if targets is None or name in targets]
        return self.layers * rank * sum(outputs + inputs for outputs, inputs in adapted)


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
