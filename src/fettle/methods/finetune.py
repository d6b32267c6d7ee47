"""Fine-tuning with LoRA by any method: `fettle train`, top to bottom."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from fettle.adapters.lora import adapt
from fettle.adapters.model_ref import resolve
from fettle.checkpoints.adapter_facts import AdapterFacts, write_facts
from fettle.checkpoints.dtypes import name_of
from fettle.checkpoints.fingerprint import fingerprint, tokenizer_fingerprint
from fettle.data.named_templates import set_chat_template
from fettle.errors import UserError, option
from fettle.evaluation import longest_exchange
from fettle.events import Report, ignore
from fettle.files import shell_path, sibling
from fettle.methods.dpo import DPO
from fettle.methods.kto import KTO
from fettle.methods.reference_free import ReferenceFree
from fettle.methods.sft import Supervised
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.device import device_of
from fettle.models.load import load_model
from fettle.models.save import save_tokenizer
from fettle.planning.program import note_program
from fettle.planning.shapes import Shapes
from fettle.quantization.layers import is_quantized
from fettle.recompute.allocator import restored_heap
from fettle.runs import resume
from fettle.runs.defaults import complete, length_limit, require_held_out, require_valid
from fettle.runs.dry_run import DryRun, try_steps
from fettle.runs.job import Job, run
from fettle.runs.memory_plan import plan_run
from fettle.runs.method import Method
from fettle.runs.method_facts import METHOD_FACTS, MethodName
from fettle.runs.options import Device, Quantization, TrainOptions
from fettle.runs.outcome import Outcome
from fettle.runs.rows import fingerprints, summary_of


def train(options: TrainOptions, *, report: Report = ignore) -> Outcome:
    """Fine-tune `options.model` on `options.data`; write adapter, tokenizer, options and report to `options.output`.

    The folder is a plain PEFT adapter. Raises UserError for an error the user can fix, before anything is written.
    Ctrl-C stops the run after the current step with a checkpoint, from which `resume_training` continues.
    """
    require_valid(options)
    options = dataclasses.replace(options, output=resume.new_output(options.output))
    note_program()
    with restored_heap():
        return run(_prepare(options, {}, report))


def dry_run(options: TrainOptions, *, report: Report = ignore) -> DryRun:
    """Do all that `train` does up to and including a few steps on the largest batch, in memory; write nothing.

    Reports the memory and time of the steps next to the plan. Raises UserError as `train` does.
    """
    require_valid(options)
    options = dataclasses.replace(options, output=resume.new_output(options.output))
    note_program()
    with restored_heap():
        return try_steps(_prepare(options, {}, report))


def resume_training(output: str | Path, *, report: Report = ignore) -> Outcome | None:
    """Resume the interrupted run in `output` with its original options; return None if it has already finished.

    The final weights are bit-identical to those of an uninterrupted run.
    """
    output = Path(output).expanduser()
    options = resume.options_to_resume(output, TrainOptions)
    if options is None:
        return None
    with restored_heap():
        return run(_prepare(options, resume.read_facts(output), report))


METHODS: dict[MethodName, Callable[[], Method]] = {
    "sft": Supervised,
    "dpo": DPO,
    "kto": KTO,
    "orpo": ReferenceFree,
    "simpo": ReferenceFree,
}


def _prepare(options: TrainOptions, facts: dict[str, Any], report: Report) -> Job:
    """Read the data, choose the remaining options, plan the memory, load the model."""
    asked_steps = options.max_steps
    ref = resolve(options.model)
    stored = ref.stored  # first, so that a broken model is reported before the data is read
    _require_no_adapter(ref.kind, options.model)
    device = device_of(options.device)
    seen = fingerprints(options)
    seen |= {"model": fingerprint(ref.base), "tokenizer": tokenizer_fingerprint(ref.base)}
    resume.require_unchanged(facts, seen, options)
    tokenizer = ref.tokenizer
    longest = length_limit(options, stored.config.max_position_embeddings)
    method, method_facts = METHODS[options.method](), METHOD_FACTS[options.method]
    template = (
        set_chat_template(tokenizer, options.chat_template) if options.chat_template is not None else []
    )
    data = method.prepare(options, tokenizer, longest)
    data.summary.template += template
    report(summary_of(data, options))
    require_held_out(options, has_held_out=data.held_out is not None)
    options = complete(
        dataclasses.replace(options, device=cast(Device, device.type), max_length=longest),
        packs=len(data.train),
        parameters=Shapes.of(stored.config).parameters,
        facts=method_facts,
    )
    run_plan = plan_run(
        options,
        stored,
        device,
        data.train_lengths,
        method_facts.forward_passes,
        report,
        data.held_out_lengths,
        longest_exchange(
            [*data.held_out_questions, *data.keep_questions], tokenizer, stored.config.max_position_embeddings
        ),
    )
    # by folder, as PEFT reads the base's config from `name_or_path` at each save
    base = load_model(ref.base, dtype=run_plan.work.dtype, device=device, quantization=options.quantization)
    model = _adapt(base, options)
    context = fixed_context(base, longest)
    quantization: Quantization | None = "nf4" if is_quantized(base) else None
    adapter_facts = AdapterFacts(
        base_fingerprint=seen["model"], context_tokens=context, quantization=quantization
    )
    dtype = quantization or name_of(base.dtype)
    return Job(
        options=options,
        asked_steps=asked_steps,
        model=model,
        tokenizer=tokenizer,
        data=data,
        model_name=options.model,
        training=method,
        method=f"{options.method}, rank {options.rank}, learning rate {options.learning_rate:g}, "
        f"{device.type}, {dtype}",
        command="train",
        facts=facts | {"fingerprints": seen},
        begin=lambda: base.set_context(context),
        save=lambda to: _save_adapter(model, tokenizer, ref.name, adapter_facts, to),
        last_file="adapter_config.json",
        next_commands=_next_commands(Path(options.output)),
        report=report,
        run_plan=run_plan,
    )


def _require_no_adapter(kind: str, model: str) -> None:
    if kind == "adapter":
        raise UserError(
            f"{option('model')} {model} is an adapter; merge it first (fettle export --model "
            f"{shell_path(model)} --format safetensors --to FOLDER) and train on the merged model."
        )


def _next_commands(result: Path) -> list[str]:
    output, merged, gguf = map(shell_path, (result, sibling(result, "-merged"), sibling(result, ".gguf")))
    return [
        f'fettle generate --model {output} --prompt "..."',
        f"fettle chat --model {output}",
        f"fettle export --model {output} --format safetensors --to {merged}",
        f"fettle export --model {output} --format gguf --to {gguf} --verify --ollama",
        f"vllm serve {merged}",
    ]


def _adapt(base: DecoderForCausalLM, options: TrainOptions) -> PeftModel:
    set_seed(options.seed)  # the adapter's initial weights are random
    return adapt(
        base,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        target_modules=options.target_modules or "all-linear",
        use_rslora=options.rslora,
    )


def fixed_context(model: DecoderForCausalLM, longest: int) -> int | None:
    """The context length to fix LongRoPE's factors for: the run's, if its rows may exceed the original context."""
    original = model.config.rope_parameters.get("original_max_position_embeddings")
    return longest if original is not None and longest > original else None


def _save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    base_name: str,
    adapter_facts: AdapterFacts,
    to: Path,
) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.target_modules = sorted(config.target_modules)  # the order of a set varies between processes
    model.save_pretrained(str(to), save_embedding_layers=False)
    (to / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    save_tokenizer(tokenizer, to)
    write_facts(to, adapter_facts)
