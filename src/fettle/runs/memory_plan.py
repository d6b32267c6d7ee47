"""The memory plan of a run: from options to a plan, applying it to the model, predicted against measured."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from fettle.adapters.model_ref import resolve
from fettle.data.batches import balanced_batches
from fettle.errors import UserError, option
from fettle.events import Message, Report, ignore
from fettle.files import human_bytes
from fettle.models.config import StoredModel
from fettle.models.device import device_of, maps_embedding, training_dtype
from fettle.planning.budget import free_bytes, parse_bytes
from fettle.planning.costs import Workload
from fettle.planning.phases import cache_bytes, most_answers
from fettle.planning.plan import Plan, Planner, allowed_policies, least_peak
from fettle.planning.program import peak_memory_bytes, program_bytes
from fettle.planning.report import planned, refusal, rounded_seconds
from fettle.planning.shapes import Shapes
from fettle.planning.speed import device_rates
from fettle.recompute.allocator import release_unused, restored_heap, set_heap
from fettle.recompute.policies import Policy
from fettle.runs.defaults import DEFAULT_MAX_LENGTH, require_valid
from fettle.runs.method_facts import METHOD_FACTS
from fettle.runs.options import LoopOptions, PlanOptions, TrainOptions
from fettle.runs.single_process import is_single_process
from fettle.threads import PRIMITIVE_BYTES, PRIMITIVE_CACHE_ENTRIES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fettle.models.decoder import DecoderForCausalLM

GPU_BASE_BYTES = 100_000_000
"""What `fettle train` uses on a GPU in addition to the model: cuBLAS workspaces."""
LATER_BYTES = 40_000_000
"""How much a CPU run's process grows after its data is read, not counting tensors: code and memory of the matrix
multiplication libraries, the trainer, its logs."""
DATA_BYTES = 18_000_000
"""How much a run's process grows while it reads its rows, not counting the tokenizer's vocabulary: measured as 18 to
20 MB for 8 to 48 rows."""
TOKENIZER_BYTES = 400
"""Bytes per vocabulary entry of a tokenizer in memory: 256,000 took 96 MB."""


def plan(options: PlanOptions, report: Report = ignore) -> Plan:
    """Predict a run's memory and time from the model's config alone, and report them. UserError if it cannot fit.

    Training rows, held-out rows and questions with their answers are all assumed to be `context` tokens long, and both
    answers of a pair to share no prompt. On a CPU
    the program is assumed to be as large as in the last run on this machine, without that run's tokenizer and rows.
    """
    require_valid(options)
    device = device_of(options.device)
    ref = resolve(options.model, need="config")
    # importing model code takes seconds, so it is avoided if sizes alone suffice
    stored = ref.stored_by_config(is_plain=options.target_modules is None)
    limit: int = stored.config.max_position_embeddings
    context = options.context or min(DEFAULT_MAX_LENGTH, limit)
    if context > limit:
        raise UserError(
            f"{option('context')} is {context}, but the model's context is {limit} tokens; use at most that."
        )
    facts = METHOD_FACTS[options.method]
    options = replace(options, batch_size=options.batch_size or facts.batch_size)
    assert options.batch_size
    documents = options.batch_size * facts.answers
    work = replace(
        _workload(options, stored, device, tokens=documents * context, documents=documents),
        evaluated_tokens=documents * context,
        answered_tokens=context,
        forward_passes=facts.forward_passes,
    )
    with restored_heap():
        chosen = _choose(options, stored.config, lambda: ref.stored_by_config().config, work, report)
    longest = chosen.planner.longest(work, chosen.budget, chosen.allowed)
    report(planned(chosen.plan, work=work, budget=chosen.budget, longest=longest))
    return chosen.plan


def _workload(
    options: PlanOptions | TrainOptions,
    stored: StoredModel,
    device: torch.device,
    *,
    tokens: int,
    documents: int,
) -> Workload:
    """The planner's input: how the weights will be stored, and which matrices are adapted."""
    assert options.batch_size
    dtype = training_dtype(options.dtype, stored.dtype, device)
    is_nf4 = stored.is_nf4 or options.quantization == "nf4"
    return Workload(
        tokens=tokens,
        documents=documents,
        batch_size=options.batch_size,
        rank=options.rank,
        targets=_adapted_matrices(stored.config, options.target_modules),
        dtype=dtype,
        is_nf4=is_nf4,
        has_dropout=options.dropout > 0,
        device_type=device.type,
        stored_item=stored.dtype.itemsize,
        has_offloaded_embedding=is_nf4 and maps_embedding(stored.config, stored.dtype, dtype, device),
    )


def _adapted_matrices(config: "PreTrainedConfig", targets: list[str] | None) -> dict[str, int] | None:
    """How many layers adapt each matrix, by PEFT's rule: a target is a module's name or the end of one.

    Raises UserError for a target that matches nothing or the output head.
    """
    if targets is None:
        return None
    from fettle.adapters.lora import require_targets  # with PEFT and all model code, which few plans need
    from fettle.models.load import empty_model

    model = empty_model(config)
    require_targets(model, targets)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    adapted = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]
    return dict(Counter(name.rpartition(".")[2] for name in adapted))


def _choose(
    options: PlanOptions | TrainOptions,
    config: "PreTrainedConfig",
    whole_config: Callable[[], "PreTrainedConfig"],
    work: Workload,
    report: Report,
) -> "RunPlan":
    """Measure the device's speed and choose the fastest plan. Raises UserError first if nothing fits the budget."""
    device, shapes = torch.device(work.device_type), Shapes.of(config)
    budget = free_bytes(device) if options.memory is None else parse_bytes(options.memory)
    allowed = allowed_policies(shapes, work, options.gradient_checkpointing)
    is_running = isinstance(options, TrainOptions)
    if is_running:
        release_unused()  # memory freed after reading the tokenizer and the rows
    base = _process_bytes(work, shapes, is_running=is_running)
    if least_peak(shapes, work, allowed, base) > budget:
        length_option = "max_length" if is_running else "context"
        raise refusal(shapes, work, allowed, base=base, budget=budget, length_option=length_option)
    rates = device_rates(whole_config, shapes, work, device, remeasure=options.remeasure, report=report)
    planner = Planner(shapes, rates, options.gradient_accumulation_steps or 1, base, _reached_bytes(device))
    best = planner.best(work, budget, allowed)
    assert best is not None
    return RunPlan(planner, work, best, budget, allowed, report)


def _process_bytes(work: Workload, shapes: Shapes, *, is_running: bool) -> int:
    """Memory of a run's process without its model: of this process with its data, or of a future run. On a GPU only
    device memory counts."""
    if work.device_type != "cpu":
        return GPU_BASE_BYTES
    later = LATER_BYTES + (PRIMITIVE_CACHE_ENTRIES * PRIMITIVE_BYTES if work.product_item < 4 else 0)
    if is_running:
        return int(psutil.Process().memory_info().rss) + later
    return program_bytes() + DATA_BYTES + TOKENIZER_BYTES * shapes.vocabulary + later


def _reached_bytes(device: torch.device) -> int:
    """The peak memory of this process so far; 0 on a GPU."""
    return peak_memory_bytes(device) if device.type == "cpu" else 0


@dataclass(slots=True)
class RunPlan:
    """A plan to apply to the model once it is loaded, and to replace by a leaner one when memory runs out."""

    planner: Planner
    work: Workload
    plan: Plan
    budget: int
    allowed: tuple[Policy, ...]
    report: Report
    model: "DecoderForCausalLM | None" = None

    @property
    def engine_memory(self) -> dict[str, int]:
        """The engine's arguments for answering questions within the planned peak."""
        shapes, work = self.planner.shapes, self.work
        count = most_answers(shapes, work, self.planner.base, self.plan.peak)
        return {"running": count, "cache_bytes": cache_bytes(shapes, work, count)}

    def apply_to(self, model: "DecoderForCausalLM") -> None:
        """Set the policy of every layer. The model must already have its adapters."""
        self.model = model
        model.set_policies(self.plan.policies)
        if self.plan.work.has_offloaded_embedding:
            model.model.offload_embedding()
        if self.plan.work.device_type == "cpu":
            set_heap("return" if self.plan.work.returns_memory else "reuse")
        if can_use_graphs(model) and Policy.OFFLOAD not in self.plan.policies:
            model.model.use_graphs(self.work.tokens)
        else:
            model.model.graphs = None

    def use_leaner_plan(self) -> bool:
        """Switch to the fastest plan with a peak at least 10% lower, or to the leanest; False if none is leaner."""
        assert self.model is not None
        least = least_peak(self.planner.shapes, self.work, self.allowed, self.planner.base)
        leaner = None
        if least < self.plan.training:
            leaner = self.planner.best(self.work, max(least, int(0.9 * self.plan.training)), self.allowed)
        if leaner is None:
            return False
        peak, less = human_bytes(self.plan.peak), human_bytes(leaner.peak)
        text = f"out of memory at a planned peak of {peak}: repeating the step with a planned peak of {less}"
        self.report(Message(text))
        self.plan = leaner
        self.apply_to(self.model)
        return True

    def outcome(
        self, peak_bytes: int, training_peak_bytes: int, tokens_per_second: float | None
    ) -> list[str]:
        """Lines that compare predicted and measured: peak memory, and seconds of a full step at the measured speed.

        If the peak was reached before the plan was made, only the peak of training was predicted.
        """
        if self.plan.phase == "planning":
            predicted, measured = human_bytes(self.plan.training), human_bytes(training_peak_bytes)
            lines = [
                f"peak memory: {human_bytes(peak_bytes)} while the data was read; "
                f"in training {predicted} predicted, {measured} measured"
            ]
        else:
            predicted, measured = human_bytes(self.plan.peak), human_bytes(peak_bytes)
            lines = [f"peak memory: {predicted} predicted, {measured} measured"]
        if tokens_per_second:
            seconds = self.plan.tokens / tokens_per_second
            predicted, measured = rounded_seconds(self.plan.seconds), rounded_seconds(seconds)
            lines.append(f"time per full step: {predicted} predicted, {measured} measured")
        return lines


def can_use_graphs(model: "DecoderForCausalLM") -> bool:
    """Whether steps can run as CUDA graphs: on a single GPU and without dropout. (Several processes reduce their
    gradients through autograd hooks, which a graph does not run.)"""
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return (
        model.device.type == "cuda"
        and is_single_process()
        and not has_dropout
        and not model.config.attention_dropout
    )


def largest_batch(options: LoopOptions, lengths: Sequence[int]) -> list[int]:
    """Return the rows of the run's largest batch; of packs, which come in random order, the largest there can be.

    lengths: tokens of each row.
    """
    assert options.batch_size and options.gradient_accumulation_steps
    if not isinstance(options, TrainOptions) or options.method == "sft":
        return sorted(range(len(lengths)), key=lengths.__getitem__)[-options.batch_size :]
    batches = max(1, -(-len(lengths) // options.batch_size))
    epochs = -(-(options.max_steps or 1) * options.gradient_accumulation_steps // batches)
    return max(
        (
            batch
            for epoch in range(epochs)
            for batch in balanced_batches(lengths, options.batch_size, seed=options.seed, epoch=epoch)
        ),
        key=lambda batch: sum(lengths[row] for row in batch),
    )


def plan_run(
    options: TrainOptions,
    stored: StoredModel,
    device: torch.device,
    lengths: Sequence[Sequence[int]],
    forward_passes: int,
    report: Report,
    held_out_lengths: Sequence[int] = (),
    answered_tokens: int = 0,
) -> RunPlan:
    """Plan the run before its model is loaded, and report the plan.

    lengths: tokens of each document of each pack; forward_passes: as in `Workload`; held_out_lengths: tokens of each
    held-out pack. answered_tokens: tokens of the longest question with its answer.
    """
    assert options.batch_size
    free = free_bytes(device)
    sizes = [sum(pack) for pack in lengths]
    work = _workload(
        options,
        stored,
        device,
        tokens=sum(sizes[row] for row in largest_batch(options, sizes)),
        documents=max(1, round(options.batch_size * sum(map(len, lengths)) / len(lengths))),
    )
    evaluated = options.batch_size * max(held_out_lengths, default=0)
    work = replace(
        work,
        evaluated_tokens=evaluated,
        answered_tokens=answered_tokens,
        forward_passes=forward_passes,
    )
    run_plan = _choose(options, stored.config, lambda: stored.config, work, report)
    report(planned(run_plan.plan, work=work, budget=run_plan.budget))
    if run_plan.budget > free:
        text = f"the memory budget of {options.memory} exceeds the {human_bytes(free)} of free memory"
        report(Message(f"{text}: the system may kill a run that uses more than is free"))
    return run_plan
