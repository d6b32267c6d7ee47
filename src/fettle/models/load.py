"""Load a model from a checkpoint folder; every fault is found before weights are read.

Official safetensors load unchanged, in the dtype they are stored in, through transformers' own loader.
Code shipped with a checkpoint is never run.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fettle.checkpoints.dtypes import DTYPES, SAFETENSORS, Dtype
from fettle.checkpoints.folder import Checkpoint, inspect, is_nf4, require_tokenizer
from fettle.checkpoints.safetensors_header import require_content
from fettle.data.template import start_renderer
from fettle.errors import UserError, reason_of
from fettle.models.config import StoredModel, read_config
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.progress_bars import without_progress_bars
from fettle.models.quantized import load_nf4
from fettle.quantization.nf4 import STATE_KEY

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Sampling options of a generation config."""
STORED_AS = ("F32", "BF16", "F16")
"""Supported dtypes for the majority of a checkpoint's weights."""


def load_model(
    folder: Path,
    *,
    name: str | None = None,
    dtype: Dtype | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: Literal["nf4"] | None = None,
) -> DecoderForCausalLM:
    """Load a full checkpoint. `name` is how the user and its adapters refer to it (default: the folder).

    quantization: "nf4" stores the layers' matrices in four bits; an NF4 checkpoint is always loaded as such.
    Raises UserError for any fault of the folder: see `fettle.checkpoints.folder`.
    """
    checkpoint = inspect(folder)
    stored, generation = stored_model(checkpoint), read_generation(folder)
    if not isinstance(dtype, torch.dtype):
        dtype = stored.dtype if dtype == "auto" else DTYPES[dtype]
    if quantization == "nf4" or stored.is_nf4:
        model = load_nf4(checkpoint, stored.config, dtype, torch.device(device))
    else:
        model = _load_plain(checkpoint, stored.config, dtype).to(torch.device(device))
    if generation is not None:
        model.generation_config = generation
    model.name_or_path = model.config._name_or_path = name or str(folder)
    return model


def _load_plain(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> DecoderForCausalLM:
    """Load through transformers' own loader."""
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


def load_tokenizer(folder: Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer; if it has no padding token, the end-of-text token is used.

    config: the model's, as `read_config` returns it; None for a tokenizer without a model. Raises UserError for a
    tokenizer that cannot be read, and for one with tokens beyond the model's embedding.
    """
    require_tokenizer(folder)
    # transformers would read config.json again and report its faults as the tokenizer's
    given = {"config": config} if config is not None and (folder / "config.json").exists() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **given
        )
        _try(tokenizer)
    except BaseException as error:  # whatever its parsers raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of its Rust code
            raise
        raise UserError(
            f"{folder}: the tokenizer cannot be read ({reason_of(error)}); expected the tokenizer.json and "
            "tokenizer_config.json of the original checkpoint."
        ) from error
    if config is not None:
        _require_rows(tokenizer, config.vocab_size, folder)
    _require_default_template(tokenizer, folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template:
        start_renderer()
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use the tokenizer once: some faults of its files show only then."""
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}, expected a number")
    tokenizer.decode(tokenizer("One word,\n and 2 more. ")["input_ids"])


def _require_rows(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """Raise UserError for tokens beyond the embedding: the first text with one would fail."""
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        index, token = beyond[0]
        raise UserError(
            f"{folder}: {len(beyond):,} of the tokenizer's tokens have no row in the model's embedding, which has "
            f"{rows:,} rows (the first is {token!r} with id {index}): save the model with its embedding resized "
            "(resize_token_embeddings in transformers; an adapter with save_embedding_layers=True in PEFT), or use the "
            "tokenizer that the weights came with."
        )


def _require_default_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise UserError for several named chat templates of which none is the default."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"{folder}: its chat templates are named {', '.join(sorted(templates))}, but none is named default; "
            "rename the one to use to default."
        )


def read_generation(folder: Path) -> GenerationConfig | None:
    """Return the folder's generation_config.json in a form that can be saved again; None if it has none.

    transformers loads contradictory settings (sampling options with `do_sample: false`), ignores them when generating,
    and refuses to save them. The ignored settings are removed here. Raises UserError if the file cannot be loaded.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return None
    require_content(file)
    try:
        generation = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        if generation.do_sample is not True:
            for name in _SAMPLING:
                setattr(generation, name, None)
        if generation.num_beams in (None, 1):
            generation.early_stopping = generation.length_penalty = None
        if generation.pad_token_id is not None and generation.pad_token_id < 0:
            generation.pad_token_id = None
        if generation.use_cache is False:
            generation.cache_implementation = None
        if generation.return_dict_in_generate is not True:
            for name in generation.extra_output_flags:
                setattr(generation, name, None)
        generation.validate(strict=True)
    except Exception as error:  # its parser and its checks raise many types
        raise UserError(
            f"{file} cannot be used ({reason_of(error)}): fix it, fetch it again, or delete it."
        ) from error
    return generation


def require_complete(checkpoint: Checkpoint, config) -> None:  # type: ignore[no-untyped-def]
    """Compare names and shapes of the stored tensors with the model's, before any tensor is read."""
    where = f"{checkpoint.folder}"
    _require_layers(checkpoint, config)
    model = empty_model(config, f"{where}/config.json")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: shape for name, (_, shape) in checkpoint.tensors.items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    # Llama checkpoints from 2023 still contain the rotary frequencies
    extra = {name for name in stored if name not in expected and not name.endswith("rotary_emb.inv_freq")}
    quantized = _require_quantized(checkpoint, expected)
    extra = {name for name in extra if name.partition(".weight.")[0] + ".weight" not in quantized}
    missing = [name for name in expected if name not in stored and name not in optional]
    plain = stored.keys() & expected.keys() - quantized
    wrong = [name for name in expected if name in plain and tuple(stored[name]) != expected[name]]
    kinds = {checkpoint.tensors[name].dtype for name in plain} - set(STORED_AS) - {"F64"}
    if kinds:
        raise UserError(
            f"{where}: some weights are stored as {min(kinds)}; expected {', '.join(STORED_AS)}, or bitsandbytes' NF4."
        )
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing, the first is '{missing[0]}'; "
            "the checkpoint is incomplete or its config.json belongs to another model."
        )
    if wrong:
        raise UserError(
            f"{where}: tensor '{wrong[0]}' has shape {tuple(stored[wrong[0]])}, but config.json implies "
            f"{expected[wrong[0]]}; the weights and config.json belong to different models."
        )
    if extra:
        raise UserError(
            f"{where}: {len(extra)} tensors do not belong to a {config.model_type} model, "
            f"the first is '{min(extra)}'; config.json belongs to another model."
        )


def _require_layers(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Compare the number of layers first: building a model of a thousand layers, even on the meta device, is slow."""
    numbers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in checkpoint.tensors)
    found = max((int(number[1]) + 1 for number in numbers if number), default=0)
    if found != config.num_hidden_layers:
        raise UserError(
            f"{checkpoint.folder}: the weights have {found} layers, but config.json says "
            f"{config.num_hidden_layers} (num_hidden_layers); the checkpoint is incomplete or its "
            "config.json belongs to another model."
        )


def _require_quantized(checkpoint: Checkpoint, expected: Iterable[str]) -> set[str]:
    """Return the names of matrices stored in NF4, whose shapes are stored in a separate tensor; raises UserError if
    config.json claims NF4 but there are none."""
    states = (name.removesuffix(".weight") + f".{STATE_KEY}" for name in expected)
    quantized = {state.removesuffix(STATE_KEY) + "weight" for state in states if state in checkpoint.tensors}
    if is_nf4(checkpoint) and not quantized:
        raise UserError(
            f"{checkpoint.folder}/config.json: quantization_config says NF4, but no tensor is stored in it; remove "
            "that entry if the weights are not quantized, or fetch the checkpoint again."
        )
    return quantized


def empty_model(config: PreTrainedConfig, where: str = "config.json") -> DecoderForCausalLM:
    """Return the model on the meta device. Raises UserError, naming `where`, if the config is not valid."""
    try:
        with torch.device("meta"):
            return causal_lm_class(config.model_type)(config)
    except Exception as error:  # a value that passed the checks but is still invalid
        raise UserError(f"{where}: does not describe a valid model: {reason_of(error)}") from error


def stored_model(checkpoint: Checkpoint) -> StoredModel:
    """Return what the checkpoint's files store. Raises UserError if they and config.json disagree."""
    config = read_config(checkpoint)
    require_complete(checkpoint, config)
    return StoredModel(config, stored_dtype(checkpoint), is_nf4(checkpoint))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the floating-point dtype of most of the checkpoint's weights, ignoring NF4's bytes and scales."""
    scales = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
    kinds = (kind for name, (kind, _) in checkpoint.tensors.items() if not name.endswith(scales))
    counts = Counter(kind for kind in kinds if kind != "U8" or not is_nf4(checkpoint))
    kind = counts.most_common(1)[0][0]
    if kind not in STORED_AS:
        raise UserError(
            f"{checkpoint.folder}: weights of type {kind} are not supported; expected F32, BF16 or F16."
        )
    return SAFETENSORS[kind]
