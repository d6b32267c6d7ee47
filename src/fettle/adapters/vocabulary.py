"""Adapters trained with an extended vocabulary: they contain the whole embedding and output head.

Users of PEFT resize the base before they load such an adapter (`resize_token_embeddings`). The rows themselves come
from the adapter's file, in whichever way PEFT stored them: as modules to save, as resized layers, or as base layers of
LoRA or trainable tokens.
"""

import re
from pathlib import Path

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig

from fettle.adapters.lora import TensorShapes
from fettle.errors import UserError
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.offloaded_embedding import OffloadedEmbedding

_WHOLE = re.compile(r"(embed_tokens|lm_head)\.((modules_to_save|(token_adapter\.)?base_layer)\.)?weight$")
_PART = re.compile(r"(embed_tokens\.lora_embedding_A|lm_head\.lora_B\.weight)$")


def rows_with(config: PreTrainedConfig, adapter: LoraConfig, shapes: TensorShapes, folder: Path) -> int:
    """Return the number of rows of embedding and head with the adapter: the base's, or those in the adapter.

    shapes: of the adapter's tensors. Raises UserError if the number differs from the base's and the adapter does not
    contain all rows.
    """
    whole = {found[1]: shapes[name][0] for name in shapes if (found := _WHOLE.search(name))}
    parts = {max(shapes[name]) for name in shapes if _PART.search(name)}
    rows = set(whole.values()) | parts
    if rows <= {config.vocab_size}:
        return int(config.vocab_size)
    has_own_copy = "embed_tokens" in (adapter.modules_to_save or ()) and not adapter.ensure_weight_tying
    is_tied = config.tie_word_embeddings and not has_own_copy
    needed = {"embed_tokens"} if is_tied else {"embed_tokens", "lm_head"}
    if len(rows) > 1 or not needed <= whole.keys():
        raise UserError(
            f"{folder}: the adapter was trained with a vocabulary of {max(rows):,} tokens and its base has "
            f"{config.vocab_size:,}, but it does not contain all rows of {' and '.join(sorted(needed))}: save it again "
            "with save_embedding_layers=True."
        )
    return rows.pop()


def fit_vocabulary(model: DecoderForCausalLM, rows: int, shapes: TensorShapes) -> None:
    """Resize embedding and head to `rows`, and make them loadable if the adapter has tensors for them."""
    table = model.model.embed_tokens
    if isinstance(table, OffloadedEmbedding) and any(".embed_tokens." in name for name in shapes):
        # PEFT loads only into parameters, and an offloaded table is not one
        model.model.embed_tokens = nn.Embedding.from_pretrained(
            table.weight.clone(), padding_idx=table.padding_idx
        )
    if rows != model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter's rows replace all
