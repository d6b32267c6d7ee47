"""The decoder: embedding, layers (layer.py), final norm, head. One for every family.

It reproduces stock transformers in fp32 (tests/models/test_parity.py) and is a `PreTrainedModel`, so official
checkpoints load and save through transformers' own code. Packed rows are marked by `position_ids` that restart, never
by a dense mask, and attention never crosses documents.

Shapes: B batch, N tokens per row, E hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from fettle.models.attention_context import AttentionContext, MaskedBatch, PackedDocuments
from fettle.models.families import FAMILIES, Family, option, sliding_window_of
from fettle.models.graphs import LayerGraphs, active_adapters
from fettle.models.layer import DecoderLayer, DecoderRMSNorm
from fettle.models.offloaded_embedding import OffloadedEmbedding
from fettle.models.packing import find_documents, row_documents
from fettle.models.projections import project
from fettle.models.rope import DecoderRotaryEmbedding
from fettle.recompute.policies import Policy

LONG_ROW = 512  # tokens; longer rows are scored with packed attention, as stock's scores take N^2 memory


class DecoderPreTrainedModel(PreTrainedModel):
    """What transformers requires of a model class; the family's own attributes are set by `causal_lm_class`."""

    family: Family
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012  # checkpoints of 2023
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for its attention interface in this file

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """The switch of transformers and TRL: recompute every layer, or none. A memory plan chooses per layer."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        layers = (module for module in self.modules() if isinstance(module, DecoderLayer))
        for index, layer in enumerate(layers):
            layer.policy = Policy.RECOMPUTE if enable and index % every_n_layers == 0 else Policy.KEEP

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DecoderRMSNorm) and module.offset:
            init.zeros_(module.weight)


class Decoder(DecoderPreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: PreTrainedConfig, family: Family) -> None:
        self.family = family
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, family, i) for i in range(config.num_hidden_layers))
        self.is_sliding = [sliding_window_of(config, i) is not None for i in range(len(self.layers))]
        self.norm = DecoderRMSNorm(config.hidden_size, config.rms_norm_eps, family.has_norm_offset)
        self.rotary_emb = DecoderRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.graphs: LayerGraphs | None = None
        self.post_init()

    def offload_embedding(self) -> None:
        """Offload the frozen token embedding to host memory; it must not be tied to the head."""
        if not isinstance(self.embed_tokens, OffloadedEmbedding):
            self.embed_tokens = OffloadedEmbedding(self.embed_tokens.weight, self.embed_tokens.padding_idx)

    def use_graphs(self, tokens: int) -> None:
        """Run training batches of up to `tokens` tokens as CUDA graphs; for frozen embeddings without dropout."""

        self.graphs = LayerGraphs(
            self.run_layers, self.layers.parameters(), tokens, active_adapters(self.layers)
        )

    def run_layers(self, x: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """x: (B, N, E) -> (B, N, E), before the final norm."""
        for layer in self.layers:
            x = layer(x, context)
        return x

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        shares_prefixes: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids: (B, N). `position_ids` (B, N) that restart within a row mark packed documents; with
        `shares_prefixes` those that restart above 0 mark documents that share their first tokens (packing.py)."""
        x = self.embed(input_ids, inputs_embeds)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        packed = None
        if position_ids is None:
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        elif seen == 0:
            packed = find_documents(
                position_ids.expand(x.shape[0], -1), attention_mask, shares_prefixes=shares_prefixes
            )
        if packed is not None and past_key_values is not None:
            raise ValueError(
                "packed rows (position_ids that restart) cannot fill a cache; pass use_cache=False"
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and packed is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        is_long = not use_cache and x.shape[1] > LONG_ROW
        is_own = packed is None and past_key_values is None and self.has_own_attention
        documents = row_documents(x, attention_mask) if is_own and (self.training or is_long) else packed

        lengths = None if packed is None else packed.lengths.view(x.shape[:2])
        rotation = self.rotary_emb(x, position_ids, lengths)
        context: AttentionContext
        if documents is not None:
            context = PackedDocuments(rotation, documents)
        else:
            masks = self.masks(x, attention_mask, position_ids, past_key_values)
            context = MaskedBatch(rotation, masks, past_key_values, kwargs)
        if output_hidden_states:
            states = [x]
            for layer in self.layers:
                states.append(layer(states[-1], context))
            states[-1] = self.norm(states[-1])
            return BaseModelOutputWithPast(states[-1], past_key_values, hidden_states=tuple(states))
        graphs = self.graphs if self.training else None
        if graphs is not None and isinstance(context, PackedDocuments) and graphs.serves(x):
            return BaseModelOutputWithPast(self.norm(graphs.run(x, context)))
        return BaseModelOutputWithPast(self.norm(self.run_layers(x, context)), past_key_values)

    @property
    def has_own_attention(self) -> bool:
        """Whether packed attention may replace the configured one: not if the user chose an implementation."""
        return self.config._attn_implementation in ("sdpa", "eager")

    def embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.family.has_scaled_embedding and inputs_embeds is None:
            # the factor is rounded to the weights' dtype first, as Gemma was trained
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        return x

    def masks(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ) -> dict[bool, torch.Tensor | None]:
        """Return the masks of layers without (False) and with (True) a sliding window, None if none is needed."""
        if isinstance(attention_mask, dict):  # created by `generate`
            return {
                False: attention_mask.get("full_attention"),
                True: attention_mask.get("sliding_attention"),
            }
        inputs = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        make = {False: create_causal_mask, True: create_sliding_window_causal_mask}
        return {is_sliding: make[is_sliding](**inputs) for is_sliding in set(self.is_sliding)}


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with its head; instantiate a family's class from `causal_lm_class`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config, self.family)
        self.vocab_size: int = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_policies(self, policies: Sequence[Policy]) -> None:
        """Choose what each layer keeps for backward, first layer first."""
        for layer, policy in zip(self.model.layers, policies, strict=True):
            assert isinstance(layer, DecoderLayer)
            layer.policy = policy

    def set_context(self, tokens: int | None) -> None:
        """Fix LongRoPE's factors for a context of `tokens`; None lets each document decide (see rope.py)."""
        self.model.rotary_emb.context_tokens = tokens

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return `forward`'s inputs for the next token; drops a cache made with other LongRoPE factors."""
        if past_key_values is not None and self.model.rotary_emb.changes_factors(
            past_key_values.get_seq_length(), input_ids.shape[1]
        ):
            past_key_values = kwargs["next_sequence_length"] = None
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, **kwargs
        )
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, N, vocabulary) and, with labels (B, N; -100 = ignored), the mean loss."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x: the decoder's output (..., E) -> (..., vocabulary)."""
        (logits,) = project(x, self.lm_head)
        cap: float | None = option(self.config, "final_logit_softcapping")
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _make_class(family: Family) -> type[DecoderForCausalLM]:
    facts = {
        "__module__": __name__,
        "__doc__": f"fettle's decoder as {family.architecture}.",
        "config_class": family.config,
        "family": family,
        "_supports_sdpa": not family.has_softcap,
    }
    return type(family.architecture, (DecoderForCausalLM,), facts)


_CLASSES = {model_type: _make_class(family) for model_type, family in FAMILIES.items()}


def causal_lm_class(model_type: str) -> type[DecoderForCausalLM]:
    """Return the model class of a family, named as its official architecture, which saved configs then name."""
    return _CLASSES[model_type]
