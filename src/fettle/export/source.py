"""A model as a stream of tensors: with its adapter merged and NF4 dequantized, one tensor in memory at a time.

Merging a stored matrix gives W + scale * B A in fp32. An adapter trained on NF4 weights is merged onto the dequantized
weights: from a checkpoint's own codes, or from those that quantizing a plain checkpoint gives. Anything beyond plain
LoRA (DoRA, ranks per layer, biases, embeddings, modules, PiSSA) goes through PEFT's own merge, which needs the whole
model in memory.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fettle.adapters.lora import TensorShapes, is_plain_lora, require_whole
from fettle.adapters.model_ref import ModelRef, resolve
from fettle.checkpoints.folder import ADAPTER_WEIGHTS, Checkpoint, is_nf4
from fettle.engine.text import stop_ids
from fettle.errors import UserError, option
from fettle.export.merge import load_merged, write_down_context
from fettle.models.load import empty_model, read_generation
from fettle.models.quantized import StoredTensors
from fettle.ops.nf4 import nf4_dequantize, nf4_quantize
from fettle.quantization.layers import HEAD, plain_linears

Update = Callable[[torch.Tensor], torch.Tensor]
"""Merges the adapter's update into a matrix."""


@dataclass(slots=True, kw_only=True)
class Source:
    """A model to export, and what is written of it.

    dtype: of the stored weights. tensors: called for every pass, yields Hugging Face's name and the
    dense tensor. generation: its eos_token_id lists all stop tokens, see `stop_ids`.
    """

    ref: ModelRef
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    generation: GenerationConfig

    @property
    def name(self) -> str:
        """The model's name without its folder; a hub model's folder is named by a hash."""
        return Path(self.ref.name).name

    @property
    def stop_ids(self) -> list[int]:
        return list(self.generation.eos_token_id or [])


def open_source(name: str | Path) -> Source:
    """Resolve `name` (as `fettle.load` does) without reading its weights; UserError for every fault."""
    ref = resolve(name)
    config = copy.deepcopy(ref.stored.config)  # merging changes it
    source = Source(
        ref=ref,
        config=config,
        tokenizer=ref.tokenizer,
        dtype=ref.stored.dtype,
        tensors=lambda: _from_checkpoint(ref.checkpoint),
        generation=_generation(ref.base, config, ref.tokenizer),
    )
    if ref.kind == "adapter":
        _adapted(source)
    given = source.tensors
    source.tensors = lambda: _finite(given(), ref.path)
    return source


def _finite(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on; UserError if one contains NaN or Inf."""
    for name, tensor in tensors:
        lowest, highest = tensor.aminmax()  # propagates NaN to both; takes a tenth of isfinite's time
        if not (lowest.isfinite() and highest.isfinite()):
            raise UserError(
                f"{folder}: the tensor {name} contains NaN or Inf, so nothing was written: training diverged or the "
                "file is damaged; use an earlier checkpoint, or fetch it again."
            )
        yield name, tensor


def _adapted(source: Source) -> None:
    """Replace the source's tensors by those of the merged model."""
    ref = source.ref
    adapter, facts, checkpoint = ref.lora, ref.facts, ref.checkpoint
    if facts is not None:
        write_down_context(source.config, facts.context_tokens)
    if not is_plain_lora(adapter, ref.shapes):
        if {HEAD, "embed_tokens"} & set(adapter.modules_to_save or ()) and not adapter.ensure_weight_tying:
            source.config.tie_word_embeddings = False  # trained separately
        source.tensors = lambda: _whole(ref)
        return
    require_plain(source.config, adapter, ref.shapes, ref.path)
    has_to_be_nf4 = facts is not None and facts.quantization == "nf4" and not is_nf4(checkpoint)
    trained_dtype = source.dtype  # source.dtype may be changed to the dtype to write
    matrices = {f"{name}.weight" for name in plain_linears(empty_model(source.config))}

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        updates = _updates(ref)
        for name, tensor in _from_checkpoint(checkpoint):
            if has_to_be_nf4 and name in matrices:
                tensor = nf4_dequantize(nf4_quantize(tensor.to(trained_dtype)))
            yield name, updates[name](tensor) if name in updates else tensor

    source.tensors = merged


def require_plain(config: PreTrainedConfig, adapter: LoraConfig, shapes: TensorShapes, folder: Path) -> None:
    """Raise UserError unless a plain adapter is complete, fits the model, and does not adapt a tied output head."""
    require_whole(empty_model(config), adapter, shapes, folder)
    if config.tie_word_embeddings and any(f".{HEAD}.lora_" in name for name in shapes):
        raise UserError(
            f"{folder}: it adapts '{HEAD}', which is tied to the embedding in this model and cannot be merged alone: "
            "use the adapter unmerged in PEFT, or train one without the output head."
        )


def adapter_scale(adapter: LoraConfig) -> float:
    """Return the factor on B A: alpha / rank, or alpha / sqrt(rank) for a rank-stabilized adapter."""
    return float(adapter.lora_alpha / (math.sqrt(adapter.r) if adapter.use_rslora else adapter.r))


def adapter_matrices(folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each adapted matrix's name in the base model, A (rank, inputs) and B (outputs, rank).

    Raises UserError if they contain NaN or Inf.
    """
    with safe_open(str(folder / ADAPTER_WEIGHTS), framework="pt") as file:
        for name in sorted(file.keys()):
            if name.endswith(".lora_A.weight"):
                target = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                a, b = file.get_tensor(name), file.get_tensor(name.replace(".lora_A.", ".lora_B."))
                if not (a.isfinite().all() and b.isfinite().all()):
                    raise UserError(
                        f"{folder}: the adapter contains NaN or Inf: its training diverged; train again with a lower "
                        f"{option('learning_rate')}."
                    )
                yield f"{target}.weight", a, b


def _updates(ref: ModelRef) -> dict[str, Update]:
    scale = adapter_scale(ref.lora)

    def update(a: torch.Tensor, b: torch.Tensor) -> Update:
        # In place, as tensors read from a checkpoint are copies; in PEFT's order, for bit-identical results.
        return lambda weight: weight.float().add_((b.float() @ a.float()).mul_(scale))

    return {name: update(a, b) for name, a, b in adapter_matrices(ref.path)}


def _from_checkpoint(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's own tensors, with NF4 matrices dequantized."""
    stored = StoredTensors(checkpoint, torch.device("cpu"))
    for name in stored.places:
        layer, _, part = name.rpartition(".weight")
        if name.endswith("rotary_emb.inv_freq") or (part and stored.is_nf4(layer)):
            continue  # recomputed from the config; or a part of an NF4 matrix, which is yielded below
        yield name, nf4_dequantize(stored.nf4(layer)[0]) if stored.is_nf4(layer) else stored.read(name)


def _whole(ref: ModelRef) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge the whole model in memory, with PEFT."""
    full, _ = load_merged(ref, device="cpu")
    yield from full.state_dict().items()


def _generation(base: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the base's generation config with fettle's stop tokens, as other tools stop only at those it lists."""
    file = base / "generation_config.json"
    generation = read_generation(base) or GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id or []
    if not all(type(each) is int for each in (ends if isinstance(ends, list) else [ends])):
        raise UserError(f"{file}: eos_token_id is {ends!r}; expected a token id or a list of token ids.")
    generation.eos_token_id = stop_ids(generation.eos_token_id, tokenizer) or None
    return generation
