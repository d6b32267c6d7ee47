"""From a checkpoint folder to a model: every fault is found before a weight is read.

Official safetensors load unchanged, in the dtype they are stored in, through transformers' own loader.
Code that a checkpoint ships is never run.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from fettle.data.template import start_renderer
from fettle.errors import UserError, reason_of
from fettle.models.checkpoint import Checkpoint, inspect, is_nf4, require_tokenizer
from fettle.models.config import DTYPES, Dtype, StoredModel, read_config
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.quantized import load_nf4
from fettle.models.quiet import without_progress_bars
from fettle.quantization.nf4 import STATE_KEY

"""The type to hold weights in; `auto` is the checkpoint's own."""

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_model(
    folder: Path,
    *,
    name: str | None = None,
    dtype: Dtype | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: Literal["nf4"] | None = None,
) -> DecoderForCausalLM:
    """Load a full checkpoint. `name` is what its user and adapters call it (default: the folder).

    quantization: "nf4" holds the layers' matrices in four bits; a checkpoint stored so is loaded so in any case.
    Raises UserError for whatever is wrong with the folder: see `fettle.models.checkpoint`.
    """
    checkpoint = inspect(folder)
    stored = stored_model(checkpoint)
    if not isinstance(dtype, torch.dtype):
        dtype = stored.dtype if dtype == "auto" else DTYPES[dtype]
    if quantization == "nf4" or stored.is_nf4:
        model = load_nf4(checkpoint, stored.config, dtype, torch.device(device))
    else:
        model = _load_plain(checkpoint, stored.config, dtype).to(torch.device(device))
    model.name_or_path = model.config._name_or_path = name or str(folder)
    return model


def _load_plain(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> DecoderForCausalLM:
    """Through transformers' own loader."""
    try:
        with without_progress_bars():
            model: DecoderForCausalLM = causal_lm_class(config.model_type).from_pretrained(
                str(checkpoint.folder),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
            )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        file = checkpoint.folder / "generation_config.json"  # the one file here that has not been checked
        if not file.exists():
            raise
        raise UserError(
            f"{file}: transformers cannot use it ({reason_of(error)}): fix it or fetch it again."
        ) from error
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer; a missing padding token becomes the end-of-text token."""
    require_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its parsers do
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({reason_of(error)}); expected the tokenizer.json and "
            "tokenizer_config.json of the original checkpoint."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        start_renderer()
    return tokenizer


def require_complete(checkpoint: Checkpoint, config) -> None:  # type: ignore[no-untyped-def]
    """Compare the files' tensors with the model's: names and shapes, before anything is read."""
    where = f"{checkpoint.folder}"
    model = empty_model(config, f"{where}/config.json")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: shape for name, (_, shape) in checkpoint.tensors.items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    # Llama checkpoints of 2023 still carry the rotary frequencies
    extra = {name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")}
    quantized = _require_quantized(checkpoint, expected)
    extra = {name for name in extra if name.partition(".weight.")[0] + ".weight" not in quantized}
    missing = [name for name in expected if name not in stored and name not in optional]
    plain = stored.keys() & expected.keys() - quantized
    wrong = [name for name in expected if name in plain and tuple(stored[name]) != expected[name]]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing, '{missing[0]}' the first; "
            "the checkpoint is incomplete or its config.json is another model's."
        )
    if wrong:
        raise UserError(
            f"{where}: tensor '{wrong[0]}' has shape {tuple(stored[wrong[0]])}, and config.json asks for "
            f"{expected[wrong[0]]}; the weights and config.json are of different models."
        )
    if extra:
        raise UserError(
            f"{where}: {len(extra)} tensors have no place in a {config.model_type} model, "
            f"'{min(extra)}' the first; config.json is another model's."
        )


def _require_quantized(checkpoint: Checkpoint, expected: Iterable[str]) -> set[str]:
    """The matrices stored in NF4, whose shapes stand in a tensor of their own; refuses a config that claims some."""
    states = (name.removesuffix(".weight") + f".{STATE_KEY}" for name in expected)
    quantized = {state.removesuffix(STATE_KEY) + "weight" for state in states if state in checkpoint.tensors}
    if is_nf4(checkpoint) and not quantized:
        raise UserError(
            f"{checkpoint.folder}/config.json: quantization_config says NF4, and no stored tensor is in it; take that "
            "entry out if the weights are the original ones, or fetch the checkpoint again."
        )
    return quantized


def empty_model(config: PreTrainedConfig, where: str = "config.json") -> DecoderForCausalLM:
    """The model without its memory. Raises UserError, naming `where`, for a config that makes none."""
    try:
        with torch.device("meta"):
            return causal_lm_class(config.model_type)(config)
    except Exception as error:  # a value that passed as valid and yet makes no model
        raise UserError(f"{where}: no model can be made of it: {reason_of(error)}") from error


def stored_model(checkpoint: Checkpoint) -> StoredModel:
    """Return what the checkpoint stores, as its files have it. Raises UserError where they and config.json disagree."""
    config = read_config(checkpoint)
    require_complete(checkpoint, config)
    return StoredModel(config, stored_dtype(checkpoint), is_nf4(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point type most of the checkpoint's weights are stored in, NF4's bytes and scales left out."""
    scales = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
    kinds = (kind for name, (kind, _) in checkpoint.tensors.items() if not name.endswith(scales))
    counts = Counter(kind for kind in kinds if kind != "U8" or not is_nf4(checkpoint))
    kind = counts.most_common(1)[0][0]
    if kind not in _STORED:
        raise UserError(
            f"{checkpoint.folder}: weights of type {kind} are not supported; expected F32, BF16 or F16."
        )
    return _STORED[kind]
