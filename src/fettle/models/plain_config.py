"""A family's config without transformers, with the options a plan needs: importing transformers takes seconds.

tests/models/test_plain_config.py compares it with transformers' own, option by option.
"""

from collections.abc import Mapping
from typing import Any

from fettle.models.families import USUAL, Family

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def plain_config(family: Family, content: Mapping[str, Any]) -> Any:
    """Return an object with the options of a family's config that a plan needs, from config.json's content alone.

    As in transformers' class, it lacks options of other families.
    """
    declared = USUAL | {"head_dim": None} | dict(family.defaults)
    values = {name: content.get(name, value) for name, value in declared.items()}
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = content["num_attention_heads"]
    if family.activations:
        values["hidden_act"] = family.activations.get(values["hidden_act"], values["hidden_act"])
    if family.layer_types == "late" and not values["use_sliding_window"]:
        values["sliding_window"] = None
    if family.layer_types != "full":
        values["layer_types"] = content.get("layer_types") or _layer_types(
            family, values, content["num_hidden_layers"]
        )
    values |= {name: content[name] for name in SIZES} | {"model_type": content["model_type"]}
    return type("PlainConfig", (), values)()  # class attributes, which families.option looks for


def _layer_types(family: Family, values: Mapping[str, Any], layers: int) -> list[str]:
    if family.layer_types == "alternating":
        is_sliding = [layer % 2 == 0 for layer in range(layers)]
    else:
        has_window = values["sliding_window"] is not None
        is_sliding = [has_window and layer >= values["max_window_layers"] for layer in range(layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]
