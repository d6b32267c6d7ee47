"""The type of each tensor in a GGUF file of a given quantization: llama.cpp's own mixtures.

A quantization like q4_k_m is a mixture: most matrices get one type, while those most sensitive to rounding (attention's
values, the MLP's down projection, the output head) get a finer one, in some layers or in all. The rules below follow
llama.cpp's `llama-quant.cpp` of 2026 for dense models with fewer than 70 billion weights. Releases before it introduced
tensor categories differ in two ways: a fused attn_qkv did not count as attn_v (q4_k_m used q5_k for all), and narrow
q2_k and q3_k matrices became iq4_nl.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from fettle.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """The position of a matrix in the model, as far as the rules depend on it."""

    layer: int
    """0 for matrices outside the layers."""
    layers: int
    queries_per_key: int
    """Query heads that share a key and value head."""
    has_importance: bool = False

    @property
    def is_early(self) -> bool:
        """In the first eighth of the layers."""
        return self.layer < self.layers // 8

    @property
    def is_sensitive(self) -> bool:
        """In the first or last eighth of the layers, or every third between them."""
        eighth = self.layers // 8
        return self.is_early or self.layer >= 7 * self.layers // 8 or (self.layer - eighth) % 3 == 2


Rule = Callable[[Position], Type | None]
"""Returns the type for a position, or None for the quantization's usual one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """One file format as users name it."""

    file_type: LlamaFileType
    usual: Type
    values: Rule = lambda place: None
    """For attn_v, and for attn_qkv if the projections are fused."""
    attention_output: Rule = lambda place: None
    down: Rule = lambda place: None
    """For ffn_down."""
    is_plain: bool = field(default=False)
    """Every matrix has the usual type."""


def _always(kind: Type) -> Rule:
    return lambda place: kind


def _sensitive(kind: Type) -> Rule:
    return lambda place: kind if place.is_sensitive else None


def _grouped(kind: Type, otherwise: Type | None = None) -> Rule:
    """If at least four query heads share a value head, the matrix is small and can have a finer type."""
    return lambda place: kind if place.queries_per_key >= 4 else otherwise


def _first_layers(count: int, kind: Type, otherwise: Type | None = None) -> Rule:
    return lambda place: kind if place.layer < count else otherwise


def _early_with_importance(kind: Type) -> Rule:
    return lambda place: kind if place.is_early and place.has_importance else None


def _early_without_importance(kind: Type) -> Rule:
    return lambda place: kind if place.is_early and not place.has_importance else None


QUANTIZATIONS: dict[str, Quantization] = {
    "f32": Quantization(file_type=LlamaFileType.ALL_F32, usual=Type.F32, is_plain=True),
    "f16": Quantization(file_type=LlamaFileType.MOSTLY_F16, usual=Type.F16, is_plain=True),
    "bf16": Quantization(file_type=LlamaFileType.MOSTLY_BF16, usual=Type.BF16, is_plain=True),
    "q8_0": Quantization(file_type=LlamaFileType.MOSTLY_Q8_0, usual=Type.Q8_0, is_plain=True),
    "q4_0": Quantization(
        file_type=LlamaFileType.MOSTLY_Q4_0, usual=Type.Q4_0, down=_early_with_importance(Type.Q4_1)
    ),
    "q5_0": Quantization(
        file_type=LlamaFileType.MOSTLY_Q5_0, usual=Type.Q5_0, down=_early_with_importance(Type.Q5_1)
    ),
    "q2_k": Quantization(
        file_type=LlamaFileType.MOSTLY_Q2_K,
        usual=Type.Q2_K,
        values=_grouped(Type.Q4_K, otherwise=Type.Q3_K),
        attention_output=_always(Type.Q3_K),
        down=_always(Type.Q3_K),
    ),
    "q3_k_s": Quantization(file_type=LlamaFileType.MOSTLY_Q3_K_S, usual=Type.Q3_K),
    "q3_k_m": Quantization(
        file_type=LlamaFileType.MOSTLY_Q3_K_M,
        usual=Type.Q3_K,
        values=_first_layers(2, Type.Q5_K, otherwise=Type.Q4_K),
        attention_output=_always(Type.Q4_K),
        down=lambda place: Type.Q5_K if place.layer < place.layers // 16 else Type.Q4_K,
    ),
    "q3_k_l": Quantization(
        file_type=LlamaFileType.MOSTLY_Q3_K_L,
        usual=Type.Q3_K,
        values=_always(Type.Q5_K),
        attention_output=_always(Type.Q5_K),
        down=_always(Type.Q5_K),
    ),
    "q4_k_s": Quantization(
        file_type=LlamaFileType.MOSTLY_Q4_K_S,
        usual=Type.Q4_K,
        values=_first_layers(4, Type.Q5_K),
        down=lambda place: Type.Q5_K if place.is_early else None,
    ),
    "q4_k_m": Quantization(
        file_type=LlamaFileType.MOSTLY_Q4_K_M,
        usual=Type.Q4_K,
        values=_sensitive(Type.Q6_K),
        down=_sensitive(Type.Q6_K),
    ),
    "q5_k_s": Quantization(file_type=LlamaFileType.MOSTLY_Q5_K_S, usual=Type.Q5_K),
    "q5_k_m": Quantization(
        file_type=LlamaFileType.MOSTLY_Q5_K_M,
        usual=Type.Q5_K,
        values=_sensitive(Type.Q6_K),
        down=_sensitive(Type.Q6_K),
    ),
    "q6_k": Quantization(file_type=LlamaFileType.MOSTLY_Q6_K, usual=Type.Q6_K),
    "iq4_xs": Quantization(
        file_type=LlamaFileType.MOSTLY_IQ4_XS,
        usual=Type.IQ4_XS,
        values=_grouped(Type.Q5_K),
        down=_early_without_importance(Type.Q5_K),
    ),
}

# The type, in blocks of 32, for a matrix whose width is not a multiple of 256.
NARROW = {
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


def quantization_of(name: str) -> Quantization:
    """Return the quantization of that name, ignoring case; UserError with the most similar names otherwise."""
    if name.lower() in QUANTIZATIONS:
        return QUANTIZATIONS[name.lower()]
    near = difflib.get_close_matches(name.lower(), QUANTIZATIONS, n=3, cutoff=0.4) or list(QUANTIZATIONS)
    raise UserError(f"'{name}' is not a quantization fettle writes; did you mean {', '.join(near)}?")


def tensor_type(
    name: str,
    shape: tuple[int, ...],
    quantization: Quantization,
    place: Position,
    *,
    is_tied: bool,
) -> Type:
    """Return the type of tensor `name` (as GGUF names it) of `shape` (rows, columns).

    Vectors, norms and factors stay in fp32. is_tied: the output head is the embedding.
    """
    if len(shape) < 2 or not name.endswith("weight") or name.endswith("_norm.weight"):
        return Type.F32
    return _that_fits(_wanted(name, quantization, place, is_tied), shape[-1])


def _wanted(name: str, quantization: Quantization, place: Position, is_tied: bool) -> Type:
    if quantization.is_plain:
        return quantization.usual
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        return Type.Q6_K
    rules: dict[str, Rule] = {
        "attn_v": quantization.values,
        "attn_qkv": quantization.values,
        "attn_output": quantization.attention_output,
        "ffn_down": quantization.down,
    }
    part = re.sub(r"^blk\.\d+\.|\.weight$", "", name)
    chosen = rules[part](place) if part in rules else None
    return chosen or quantization.usual


def _that_fits(wanted: Type, columns: int) -> Type:
    """Return `wanted`, or a substitute with smaller blocks if a row is not a whole number of its blocks."""
    for kind in (wanted, NARROW.get(wanted, wanted)):
        if columns % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Type.F16
