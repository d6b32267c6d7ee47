"""Supervised fine-tuning with an adapter: `fettle train`, top to bottom."""

import dataclasses
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fettle.adapters.facts import AdapterFacts, write_facts
from fettle.adapters.load import device_of, remembered_name
from fettle.adapters.lora import adapt
from fettle.data import fingerprint as data_fingerprint
from fettle.data import read_rows
from fettle.errors import UserError
from fettle.files import require_new_folder
from fettle.models.checkpoint import fingerprint, inspect, is_adapter, locate
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.load import load_model, load_tokenizer
from fettle.models.save import save_tokenizer
from fettle.options import read
from fettle.training import resume
from fettle.training.defaults import complete, length_limit, require_sensible
from fettle.training.job import Job, is_finished, run
from fettle.training.options import Device, TrainOptions
from fettle.training.outcome import Outcome
from fettle.training.rows import prepare


def train(options: TrainOptions, *, console: Console | None = None) -> Outcome:
    """Fine-tune `options.model` on `options.data`; leave adapter, tokenizer, run file and report in `output`.

    The folder is a plain PEFT adapter. Raises UserError for what the user can mend, before anything is
    written. Ctrl-C ends the run after the step at hand with a checkpoint; `resume_training` goes on from it.
    """
    require_sensible(options)
    require_new_folder(Path(options.output), "a new run")
    return run(_prepare(options, {}, console or Console()))


def resume_training(output: Path, *, console: Console | None = None) -> Outcome | None:
    """Go on with the interrupted run in `output`, with the options it was started with.

    Ends in the same weights, bit for bit, as a run that was never interrupted. None where the run has come
    to its end already.
    """
    resume.require_run(output)
    if is_finished(output):
        return None
    options = dataclasses.replace(read(TrainOptions, output / resume.RUN_FILE), output=str(output))
    return run(_prepare(options, resume.read_facts(output), console or Console()))


def _prepare(options: TrainOptions, facts: dict[str, Any], console: Console) -> Job:
    """Load the model, understand the data, choose what was left open."""
    folder = _base_folder(options.model)
    inspect(folder)
    rows = read_rows(options.data)
    seen = {"data": data_fingerprint(options.data), "base": fingerprint(folder)}
    resume.require_unchanged(facts, "data", seen["data"], f"the data ({options.data})")
    resume.require_unchanged(facts, "base", seen["base"], f"the base model ({options.model})")
    device = cast(Device, device_of(options.device).type)
    tokenizer = load_tokenizer(folder)
    base = load_model(folder, name=remembered_name(options.model), dtype=options.dtype, device=device)
    longest = length_limit(options, base.config.max_position_embeddings)
    material = prepare(options, tokenizer, longest, rows)
    show_data(material.summary.lines(), material.held_out_examples, console)

    dtype = str(base.dtype).removeprefix("torch.")
    parameters, weight_bytes = base.num_parameters(), base.get_memory_footprint()
    options = complete(
        dataclasses.replace(options, device=device, max_length=longest),
        packs=len(material.train),
        parameters=parameters,
        weight_bytes=weight_bytes,
    )
    context_tokens = fixed_context(base, longest)
    base.set_context(context_tokens)
    set_seed(options.seed)  # the adapter's first weights are random
    model = adapt(
        base,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=options.target_modules or "all-linear",
    )
    return Job(
        options=options,
        model=model,
        tokenizer=tokenizer,
        material=material,
        model_name=options.model,
        method=f"LoRA rank {options.rank}, learning rate {options.learning_rate:g}, {device}, {dtype}",
        command="train",
        facts=facts | seen,
        save=lambda to: _save_adapter(
            model, tokenizer, AdapterFacts(base_fingerprint=seen["base"], context_tokens=context_tokens), to
        ),
        last_file="adapter_config.json",
        next_commands=[
            f'fettle generate --model {options.output} --prompt "..."',
            f"fettle chat --model {options.output}",
            f"fettle export --model {options.output} --format safetensors --to {options.output}-merged",
        ],
        console=console,
    )


def fixed_context(model: DecoderForCausalLM, longest: int) -> int | None:
    """The context to fix LongRoPE's factors for: the run's, where its rows may pass the original one."""
    original = model.config.rope_parameters.get("original_max_position_embeddings")
    return longest if original is not None and longest > original else None


def _base_folder(name: str) -> Path:
    folder = locate(name)
    if is_adapter(folder):
        raise UserError(
            f"--model {name} is an adapter; merge it first (fettle export --model {name} --format safetensors "
            "--to FOLDER) and train on the merged model."
        )
    return folder


def show_data(lines: list[str], held_out_examples: int, console: Console) -> None:
    """Print what the data was understood to be."""
    console.print("[bold]data[/bold]")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    held_out = f"{held_out_examples:,} examples are held out to measure the result"
    console.print(
        held_out if held_out_examples else "none are held out: there are too few rows", highlight=False
    )


def _save_adapter(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, facts: AdapterFacts, to: Path
) -> None:
    model.save_pretrained(str(to))
    (to / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    save_tokenizer(tokenizer, to)
    write_facts(to, facts)
