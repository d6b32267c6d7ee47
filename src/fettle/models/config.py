"""Read and check a model's config.json without its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fettle.checkpoints.dtypes import DTYPES
from fettle.checkpoints.folder import Checkpoint, is_nf4, read_config_file
from fettle.errors import UserError, reason_of
from fettle.models.families import Family, family_of, option
from fettle.models.plain_config import plain_config
from fettle.ops.gated_activation import ACTIVATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REQUIRED = {
    "num_hidden_layers": 1_000,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**4,
    "vocab_size": 10**7,
}
"""Sizes that a config must state itself, as a family's default would be another model's, with the largest value
accepted: ten times that of any published model. Beyond it even a model on the meta device takes minutes to build."""
OPTIONAL = {
    "num_key_value_heads": 10**4,
    "head_dim": 10**5,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}

LARGEST_NUMBER = 1e30
"""Upper bound for rotary parameters: far beyond any model's, and within fp32."""


class StoredModel(NamedTuple):
    """What a checkpoint stores. dtype: of all tensors that are not in NF4; is_nf4: whether the layers' matrices are."""

    config: "PreTrainedConfig"
    dtype: torch.dtype
    is_nf4: bool


def config_of(folder: Path, *, is_plain: bool = False) -> StoredModel:
    """Return what the checkpoint stores according to its config; a config without dtype counts as float32.

    is_plain: return a config of models/plain_config.py, which needs no import of transformers.
    Raises UserError if there is no config, or if fettle cannot train the model.
    """
    content = read_config_file(folder)
    unseen = Checkpoint(
        folder=folder, config=content, weight_files=[], tensors={}, tensor_files={}, weight_bytes=0
    )
    dtype = DTYPES.get(str(content.get("dtype", content.get("torch_dtype"))), torch.float32)
    if is_plain and _is_ordinary(content):
        return StoredModel(plain_config(_checked_family(unseen), content), dtype, is_nf4(unseen))
    return StoredModel(read_config(unseen), dtype, is_nf4(unseen))


def _is_ordinary(content: dict[str, Any]) -> bool:
    """Whether the options that a plan does not read are certainly valid. If not, transformers and the rotary embedding
    have to check them, and importing those takes seconds."""
    rotations = [content.get(name) for name in ("rope_scaling", "rope_parameters")]
    theta, vocabulary = content.get("rope_theta", 1e4), content.get("vocab_size")
    pad = content.get("pad_token_id", 32000)  # what Phi-3's class takes if it is left out
    is_padded = pad is None or (isinstance(pad, int) and isinstance(vocabulary, int) and pad < vocabulary)
    is_windowed = content.get("sliding_window", 1) is not None or "layer_types" not in content
    is_rotated = _is_positive(theta) and all(
        _is_known_rotation(each, content["model_type"]) for each in rotations
    )
    is_causal = not content.get("use_bidirectional_attention")
    is_dropped = _is_share(content.get("attention_dropout", 0.0))
    return is_padded and is_windowed and is_rotated and is_causal and is_dropped


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < LARGEST_NUMBER


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _is_known_rotation(rotation: Any, model_type: str) -> bool:
    if rotation is None:
        return True
    if not isinstance(rotation, dict):
        return False
    kind, share = (
        rotation.get("rope_type", rotation.get("type", "default")),
        rotation.get("partial_rotary_factor"),
    )
    others = ("rope_type", "type", "partial_rotary_factor", "short_factor", "long_factor")
    is_sound = all(_is_positive(value) for name, value in rotation.items() if name not in others)
    is_sound = is_sound and (share is None or (_is_positive(share) and share <= 1))
    if kind == "longrope" or (kind == "su" and model_type == "phi3"):
        factors = (rotation.get("short_factor"), rotation.get("long_factor"))
        return is_sound and all(isinstance(each, list) and all(map(_is_positive, each)) for each in factors)
    return is_sound and kind in ("default", "llama3")


def read_config(checkpoint: Checkpoint) -> Any:
    """Return the family's config object for a checkpoint, without options that only remote code needs.

    The weights are not read. Raises UserError for a config of a model that fettle cannot train.
    """
    where, family = f"{checkpoint.folder}/config.json", _checked_family(checkpoint)
    try:
        config = family.config.from_dict(_current(checkpoint.config, family))
    except Exception as error:  # the library's checks raise many types
        cause = (
            error.__cause__ if isinstance(error.__cause__, Exception) else error
        )  # it only names the check
        raise UserError(
            f"{where}: not a valid {checkpoint.config['model_type']} config: {reason_of(cause)}"
        ) from error
    config.architectures = [family.architecture]
    _require_usable(config, where)
    return config


def _checked_family(checkpoint: Checkpoint) -> Family:
    """Return the checkpoint's family. Raises UserError for unsupported families, quantizations and sizes."""
    where = f"{checkpoint.folder}/config.json"
    family = family_of(checkpoint.config["model_type"], where)
    if not isinstance(checkpoint.quantization_config or {}, dict):
        raise UserError(
            f"{where}: quantization_config is not a JSON object; fetch the model's own config.json."
        )
    if checkpoint.quantization_config and not is_nf4(checkpoint):
        raise UserError(
            f"{where}: the checkpoint is quantized in a format other than bitsandbytes' NF4; "
            "use the original checkpoint in bf16, fp16 or fp32."
        )
    _require_sizes(checkpoint.config, where)
    _require_activation(checkpoint.config, family, where)
    return family


def _current(content: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the content with the names of current transformers, without options that fettle ignores."""
    ignored = ("auto_map", "quantization_config", "return_dict", "num_labels", "id2label", "label2id")
    content = {name: value for name, value in content.items() if name not in ignored}
    if content.get("hidden_act") in family.activations:
        content["hidden_act"] = family.activations[content["hidden_act"]]
    for name in ("rope_scaling", "rope_parameters"):
        rope = content.get(name)
        if isinstance(rope, dict) and content["model_type"] == "phi3":
            # the first uploads of Phi-3-mini-128k called LongRoPE "su"
            kinds = {each: "longrope" for each in ("type", "rope_type") if rope.get(each) == "su"}
            content[name] = rope | kinds
    return content


def _require_sizes(content: dict[str, Any], where: str) -> None:
    """Raise UserError for a size that is missing, not a whole number of 1 or more, or absurdly large."""
    for name, largest in (REQUIRED | OPTIONAL).items():
        value = content.get(name)
        if value is None and name in OPTIONAL:
            continue
        if name not in content:
            raise UserError(f"{where}: {name} is missing; fetch the model's own config.json.")
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {name} is {value!r}; expected a whole number, 1 or more.")
        if value > largest:
            raise UserError(f"{where}: {name} is larger than {largest:,}, the maximum that fettle accepts.")
    heads, shared = content["num_attention_heads"], content.get("num_key_value_heads")
    if shared is not None and heads % shared:
        raise UserError(
            f"{where}: num_key_value_heads is {shared}; expected a divisor of num_attention_heads, {heads}."
        )


def _require_activation(content: dict[str, Any], family: Family, where: str) -> None:
    """Raise UserError for an activation that transformers does not know."""
    name = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    if content.get(name) is not None and not _is_activation(content[name], family):
        raise UserError(
            f"{where}: {name} is {content[name]!r}; expected an activation that transformers has."
        )


def _require_usable(config: Any, where: str) -> None:
    """Raise UserError for values that are valid on their own but contradict each other."""
    if not _is_share(dropout := option(config, "attention_dropout", 0.0)):
        raise UserError(f"{where}: attention_dropout is {dropout!r}; expected a number from 0 to below 1.")
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise UserError(
            f"{where}: pad_token_id is {config.pad_token_id} (or missing), but the vocabulary has {config.vocab_size} "
            "tokens; expected the id of one of them, or null."
        )
    if option(config, "use_bidirectional_attention"):
        raise UserError(
            f"{where}: use_bidirectional_attention is on, but fettle trains causal models only; expected false or null."
        )
    if "sliding_attention" in (option(config, "layer_types") or ()) and config.sliding_window is None:
        raise UserError(
            f"{where}: sliding_window is null, but some layers use one; expected a number of tokens."
        )
    from fettle.models.rope import (
        DecoderRotaryEmbedding,  # it imports transformers, which a plan does without
    )

    DecoderRotaryEmbedding(config).require_usable(where)


def _is_activation(name: Any, family: Family) -> bool:
    if isinstance(name, str) and family.activations.get(name, name) in ACTIVATIONS:
        return True
    from transformers.activations import ACT2FN  # which takes seconds to import

    return isinstance(name, str) and name in ACT2FN
