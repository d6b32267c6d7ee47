"""From a run's options to the plan it follows, and from a run to what it really took."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedConfig

from fettle.adapters.load import device_of
from fettle.errors import UserError
from fettle.files import human_bytes
from fettle.memory.allocator import keep_freed_memory, return_freed_memory, return_memory
from fettle.memory.budget import free_bytes, parse_bytes
from fettle.memory.costs import Workload
from fettle.memory.plan import Plan, Planner, allowed_policies
from fettle.memory.policies import Policy
from fettle.memory.probe import probe
from fettle.memory.report import as_dict, refusal, rounded_seconds, show_plan
from fettle.memory.shapes import Shapes
from fettle.models.config import config_of
from fettle.models.decoder import DecoderForCausalLM
from fettle.models.families import Family
from fettle.models.outer_embedding import OuterEmbedding
from fettle.quantization.layers import is_quantized
from fettle.training.alone import is_alone
from fettle.training.options import PlanOptions, TrainOptions

PROGRAM_BYTES = {"cpu": 520_000_000, "cuda": 0}
"""The process before it has a model; on a GPU only what tensors take is counted."""
RUNTIME_BYTES = {"cpu": 130_000_000, "cuda": 100_000_000}
"""What the libraries take for themselves once products run: packed copies of weights, threads, cuBLAS's workspaces."""

FP32_RUNTIME_BYTES = 60_000_000
"""The same on top where products run in fp32, whose library keeps more for itself."""


def plan(options: PlanOptions, console: Console | None = None) -> Plan:
    """Print what a run would cost, from the model's config alone. Raises UserError where it cannot fit."""
    console = console or Console()
    config, family, is_nf4 = config_of(options.model)
    context = options.context or min(2048, config.max_position_embeddings)
    for name in ("context", "rank", "batch_size", "gradient_accumulation_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")
    if context > config.max_position_embeddings:
        raise UserError(
            f"--context is {context}, and the model's is {config.max_position_embeddings} tokens; ask for at most that."
        )
    device = device_of(options.device)
    budget = free_bytes(device) if options.memory is None else parse_bytes(options.memory)
    pair = 2 if options.method == "dpo" else 1
    is_nf4 = is_nf4 or options.quantization == "nf4"  # as load_model decides
    work = Workload(
        tokens=pair * options.batch_size * context,
        documents=pair * options.batch_size,
        batch_size=options.batch_size,
        rank=options.rank,
        dtype=getattr(torch, options.dtype),
        is_nf4=is_nf4,
        references=pair - 1,
        device_type=device.type,
        has_outer_embedding=is_nf4 and device.type == "cpu" and not config.tie_word_embeddings,
    )
    planner = _planner(
        config, family, work, device, options.gradient_accumulation_steps, PROGRAM_BYTES[device.type]
    )
    allowed = allowed_policies(planner.shapes, work, None)
    best = planner.best(work, budget, allowed)
    if best is None:
        raise refusal(planner, work, budget, allowed)
    longest = planner.longest(work, budget, allowed)
    if options.json:
        print(json.dumps(as_dict(best, budget=budget, longest=longest), indent=2))
    else:
        show_plan(best, console, work=work, budget=budget, longest=longest)
    return best


def _planner(
    config: PreTrainedConfig,
    family: Family,
    work: Workload,
    device: torch.device,
    accumulation: int,
    base: int,
) -> Planner:
    shapes = Shapes.of(config, family)
    if device.type == "cpu":
        keep_freed_memory()  # before the probe, which is to see what the run will
    rates = probe(config, shapes, work, device)
    return_freed_memory()  # what the probe's layer took
    runtime = RUNTIME_BYTES[device.type]
    if device.type == "cpu" and work.product_item == 4:
        runtime += FP32_RUNTIME_BYTES
    return Planner(shapes, rates, accumulation, base + runtime)


@dataclass(slots=True)
class Followed:
    """A plan put into effect on a model, with what to do when it proves too generous."""

    planner: Planner
    work: Workload
    plan: Plan
    budget: int
    allowed: tuple[Policy, ...]
    model: DecoderForCausalLM
    console: Console

    def apply(self) -> None:
        """Give every layer its policy."""
        self.model.set_policies(self.plan.policies)
        if self.plan.work.has_outer_embedding:
            self.model.model.move_embedding_out()
        if self.plan.work.device_type == "cpu":
            (return_memory if self.plan.work.returns_memory else keep_freed_memory)()
        if can_replay(self.model) and Policy.PARK not in self.plan.policies:
            self.model.model.use_graphs(self.work.tokens)
        else:
            self.model.model.graphs = None

    def step_leaner(self) -> bool:
        """Take the fastest plan with a peak at least a tenth lower; False where there is none."""
        leaner = self.planner.best(self.work, int(0.9 * self.plan.peak), self.allowed)
        if leaner is None:
            least = self.planner.leanest(self.work, self.allowed)
            leaner = least if least.peak < self.plan.peak else None
        if leaner is None:
            return False
        self.console.print(
            f"out of memory at a planned peak of {human_bytes(self.plan.peak)}: the step is repeated with a plan of "
            f"{human_bytes(leaner.peak)}",
            highlight=False,
        )
        self.plan = leaner
        self.apply()
        return True

    def outcome(self, peak_bytes: int, tokens_per_second: float | None) -> list[str]:
        """Predicted against measured; a step's seconds at the measured speed."""
        lines = [f"peak memory: {human_bytes(self.plan.peak)} predicted, {human_bytes(peak_bytes)} measured"]
        if tokens_per_second:
            seconds = self.plan.tokens / tokens_per_second
            predicted, measured = rounded_seconds(self.plan.seconds), rounded_seconds(seconds)
            lines.append(f"a full step: {predicted} predicted, {measured} measured")
        return lines


def can_replay(model: DecoderForCausalLM) -> bool:
    """Whether steps may run as CUDA graphs: on one GPU, and with nothing random in them. (Several processes sum their
    gradients as autograd hands them out, which a graph does not.)"""
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return model.device.type == "cuda" and is_alone() and not drops and not model.config.attention_dropout


def follow(
    options: TrainOptions,
    model: DecoderForCausalLM,
    lengths: Sequence[Sequence[int]],
    console: Console,
) -> Followed:
    """Plan the run, print the plan and put it into effect. lengths: of the documents of each pack."""
    device = model.device
    free = free_bytes(device)
    budget = free if options.memory is None else parse_bytes(options.memory)
    assert options.batch_size and options.gradient_accumulation_steps
    work = Workload(
        tokens=options.batch_size * max(sum(pack) for pack in lengths),
        documents=max(1, round(options.batch_size * sum(map(len, lengths)) / len(lengths))),
        batch_size=options.batch_size,
        rank=options.rank,
        targets=_adapted_matrices(model, options.target_modules),
        dtype=model.dtype,
        is_nf4=is_quantized(model),
        has_dropout=options.dropout > 0,
        device_type=device.type,
        has_outer_embedding=isinstance(model.get_input_embeddings(), OuterEmbedding),
    )
    base = PROGRAM_BYTES[device.type]
    if device.type == "cpu":  # as it is, the data included
        base = max(base, psutil.Process().memory_info().rss - model.get_memory_footprint())
    planner = _planner(model.config, model.family, work, device, options.gradient_accumulation_steps, base)
    allowed = allowed_policies(planner.shapes, work, options.gradient_checkpointing)
    best = planner.best(work, budget, allowed)
    if best is None:
        raise refusal(planner, work, budget, allowed)
    followed = Followed(planner, work, best, budget, allowed, model, console)
    followed.apply()
    show_plan(best, console, work=work, budget=budget)
    if budget > free:
        console.print(
            f"--memory {options.memory} is more than the {human_bytes(free)} that are free: a run that takes more than "
            "the machine has may be killed",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return followed


def _adapted_matrices(model: nn.Module, targets: Sequence[str] | None) -> dict[str, int] | None:
    """In how many layers each matrix is adapted, by PEFT's rule: a target is a module's name, or how one ends.

    A target that fits none stays, for the probe to refuse as `adapt` does.
    """
    if targets is None:
        return None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fitting = {target: {n for n in linear if f".{n}".endswith(f".{target}")} for target in targets}
    unknown = {target: 0 for target, names in fitting.items() if not names}
    return dict(Counter(name.rpartition(".")[2] for name in set().union(*fitting.values()))) | unknown
