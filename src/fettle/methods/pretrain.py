"""Pretraining from scratch: `fettle pretrain`. The embedded model was made with it."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from fettle.data import Row, end_of_turn
from fettle.errors import UserError, option
from fettle.events import Report, ignore
from fettle.files import shell_path
from fettle.methods.sft import Supervised
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.device import device_of
from fettle.models.families import FAMILIES
from fettle.models.save import save_model
from fettle.runs import resume
from fettle.runs.defaults import complete, length_limit, require_held_out, require_valid
from fettle.runs.dry_run import DryRun, try_steps
from fettle.runs.job import Job, run
from fettle.runs.method_facts import METHOD_FACTS
from fettle.runs.options import Device, PretrainOptions
from fettle.runs.outcome import Outcome
from fettle.runs.rows import fingerprints, read_data, summary_of
from fettle.tiny.tokenizer import train_tokenizer


def pretrain(options: PretrainOptions, *, report: Report = ignore) -> Outcome:
    """Train a tokenizer and a new model on `options.data`; write a full checkpoint to `options.output`.

    Raises UserError for an error the user can fix, before anything is written.
    """
    require_valid(options)
    options = dataclasses.replace(options, output=resume.new_output(options.output))
    return run(_prepare(options, {}, report))


def dry_run(options: PretrainOptions, *, report: Report = ignore) -> DryRun:
    """Do all that `pretrain` does up to and including a few steps on the largest batch, in memory; write nothing."""
    require_valid(options)
    options = dataclasses.replace(options, output=resume.new_output(options.output))
    return try_steps(_prepare(options, {}, report))


def resume_pretraining(output: str | Path, *, report: Report = ignore) -> Outcome | None:
    """Resume the interrupted run in `output`; return None if it has already finished."""
    output = Path(output).expanduser()
    options = resume.options_to_resume(output, PretrainOptions)
    if options is None:
        return None
    return run(_prepare(options, resume.read_facts(output), report))


def _prepare(options: PretrainOptions, facts: dict[str, Any], report: Report) -> Job:
    asked_steps = options.max_steps
    rows = read_data(options.data)
    seen = fingerprints(options)
    resume.require_unchanged(facts, seen, options)
    longest = length_limit(options, options.context)
    tokenizer = _tokenizer(rows, options)
    method = Supervised()
    data = method.prepare(options, tokenizer, longest)
    report(summary_of(data, options))
    require_held_out(options, has_held_out=data.held_out is not None)
    device = cast(Device, device_of(options.device).type)
    set_seed(options.seed)
    model = new_model(options, tokenizer).to(torch.device(device))
    parameters = model.num_parameters()
    options = complete(
        dataclasses.replace(options, device=device, max_length=longest),
        packs=len(data.train),
        parameters=parameters,
        weight_bytes=model.get_memory_footprint(),
        is_full=True,
        facts=METHOD_FACTS["sft"],
    )
    output = shell_path(Path(options.output))
    return Job(
        options=options,
        asked_steps=asked_steps,
        model=model,
        tokenizer=tokenizer,
        data=data,
        model_name=f"{FAMILIES[options.family].architecture} with {parameters / 1e6:.2f} M parameters",
        training=method,
        method=f"from scratch, learning rate {options.learning_rate:g}, {device}",
        command="pretrain",
        facts=facts | {"fingerprints": seen},
        finish=lambda: _finish(model, options),
        save=lambda to: save_model(model, tokenizer, to),
        last_file="config.json",
        next_commands=[
            f'fettle generate --model {output} --prompt "..."',
            f"fettle train --model {output} --data my_chats.jsonl --output my-model",
        ],
        report=report,
    )


def _tokenizer(rows: list[Row], options: PretrainOptions) -> PreTrainedTokenizerBase:
    try:
        tokenizer = train_tokenizer((text for row in rows for text in _texts(row)), options.vocab_size)
    except ValueError as error:
        raise UserError(f"{option('vocab_size')}: {error}.") from error
    tokenizer.model_max_length = options.context
    return tokenizer


def _finish(model: DecoderForCausalLM, options: PretrainOptions) -> None:
    """Convert the model to the dtype it is saved in, so that the scores are those of the saved model."""
    model.to(getattr(torch, options.save_dtype))
    model.config.use_cache = True  # the trainer switches it off


def _texts(row: Row) -> list[str]:
    words = [message["content"] for message in row.messages]
    return words + [text for text in (row.prompt, row.completion, row.text) if text is not None]


def new_model(options: PretrainOptions, tokenizer: PreTrainedTokenizerBase) -> DecoderForCausalLM:
    """A new model of the family's architecture: random fp32 weights, embedding tied to the head."""
    family = FAMILIES[options.family]
    if options.hidden_size % options.heads:
        raise UserError(
            f"{option('hidden_size')} {options.hidden_size} is not a multiple of {option('heads')} {options.heads}."
        )
    if options.hidden_size // options.heads % 2:
        raise UserError(
            f"{option('hidden_size')} {options.hidden_size} and {option('heads')} {options.heads} give a head size of "
            f"{options.hidden_size // options.heads}; rotary embeddings need an even head size."
        )
    if options.key_value_heads is not None and options.heads % options.key_value_heads:
        raise UserError(
            f"{option('heads')} {options.heads} is not a multiple of {option('key_value_heads')} "
            f"{options.key_value_heads}."
        )
    config = family.config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads or options.heads,
        max_position_embeddings=options.context,
        **({"original_max_position_embeddings": options.context} if options.family == "phi3" else {}),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = causal_lm_class(options.family)(config)
    stops = [tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer)), tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model
