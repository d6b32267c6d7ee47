"""From a run's options to the plan it follows, and from a run to what it really took."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psutil
import torch
from rich.console import Console
from torch import nn

from fettle import terminal
from fettle.errors import UserError
from fettle.files import human_bytes
from fettle.models.config import StoredModel, config_of
from fettle.models.device import device_of, maps_embedding, training_dtype
from fettle.planning.budget import free_bytes, parse_bytes
from fettle.planning.costs import Workload
from fettle.planning.phases import most_answers
from fettle.planning.plan import Plan, Planner, allowed_policies, least_peak
from fettle.planning.program import peak_memory_bytes, program_bytes
from fettle.planning.report import as_dict, refusal, rounded_seconds, show_plan
from fettle.planning.shapes import Shapes
from fettle.planning.speed import device_rates
from fettle.recompute.allocator import release_unused, restored_heap, set_heap
from fettle.recompute.policies import Policy
from fettle.runs.defaults import LONGEST_BY_DEFAULT, require_sensible
from fettle.runs.options import PlanOptions, TrainOptions
from fettle.runs.single_process import is_alone
from fettle.threads import KEPT_PRODUCTS, PRODUCT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fettle.models.decoder import DecoderForCausalLM

GPU_BASE_BYTES = 100_000_000
"""What `fettle train` takes on a GPU beside its model: cuBLAS's workspaces."""
LATER_BYTES = 40_000_000
"""What the process of a run on a CPU grows by once its data is read, beside tensors: the code and memory of the
libraries that multiply matrices, the trainer, its logs."""
DATA_BYTES = 18_000_000
"""What a run's process grows by while it reads its rows, without the tokenizer's tokens: measured, 18 to 20 MB for 8 to
48 rows."""
TOKENIZER_BYTES = 400
"""Of a token, in a tokenizer in memory: 256,000 took 96 MB."""


def plan(options: PlanOptions, console: Console | None = None) -> Plan:
    """Print what a run would cost, from the model's config alone. Raises UserError where it cannot fit.

    Rows, held-out rows and questions with their answers are all taken to be `context` tokens long. On a CPU the
    program is taken to be as large as that of the last run here, without the run's tokenizer and rows.
    """
    console = console or terminal.console()
    require_sensible(options)
    device = device_of(options.device)
    # only what follows from sizes alone can do without model code, which takes seconds to import
    stored = config_of(options.model, is_plain=options.target_modules is None)
    limit: int = stored.config.max_position_embeddings
    context = options.context or min(LONGEST_BY_DEFAULT, limit)
    if context > limit:
        raise UserError(f"--context is {context}, and the model's is {limit} tokens; ask for at most that.")
    rows = options.batch_size
    work = replace(
        _workload(options, stored, device, tokens=rows * context, documents=rows),
        evaluated_tokens=rows * context,
        answered_tokens=context,
    )
    with restored_heap():
        chosen = _choose(options, stored.config, lambda: config_of(options.model).config, work, console)
    longest = chosen.planner.longest(work, chosen.budget, chosen.allowed)
    if options.json:
        terminal.give(json.dumps(as_dict(chosen.plan, budget=chosen.budget, longest=longest), indent=2))
    else:
        show_plan(chosen.plan, console, work=work, budget=chosen.budget, longest=longest)
    return chosen.plan


def _workload(
    options: PlanOptions | TrainOptions,
    stored: StoredModel,
    device: torch.device,
    *,
    tokens: int,
    documents: int,
) -> Workload:
    """What these options make of the model: how its weights will be held, and what is adapted."""
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
        has_outer_embedding=is_nf4 and maps_embedding(stored.config, stored.dtype, dtype, device),
    )


def _adapted_matrices(config: "PreTrainedConfig", targets: list[str] | None) -> dict[str, int] | None:
    """In how many layers each matrix is adapted, by PEFT's rule: a target is a module's name, or how one ends.

    Raises UserError for a target that fits none, or the output head.
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
    console: Console,
) -> "Followed":
    """Time the model on the device and plan. Raises UserError before that if nothing fits the budget."""
    device, shapes = torch.device(work.device_type), Shapes.of(config)
    budget = free_bytes(device) if options.memory is None else parse_bytes(options.memory)
    allowed = allowed_policies(shapes, work, options.gradient_checkpointing)
    is_running = isinstance(options, TrainOptions)
    if is_running:
        release_unused()  # what reading the tokenizer and the rows left free
    base = _process_bytes(work, shapes, is_running=is_running)
    if least_peak(shapes, work, allowed, base) > budget:
        length_option = "--max-length" if is_running else "--context"
        raise refusal(shapes, work, allowed, base=base, budget=budget, length_option=length_option)
    to_stderr = terminal.console(stderr=True)
    rates = device_rates(whole_config, shapes, work, device, remeasure=options.remeasure, console=to_stderr)
    planner = Planner(shapes, rates, options.gradient_accumulation_steps or 1, base, _reached_bytes(device))
    best = planner.best(work, budget, allowed)
    assert best is not None
    return Followed(planner, work, best, budget, allowed, console)


def _process_bytes(work: Workload, shapes: Shapes, *, is_running: bool) -> int:
    """What a run's process takes without its model: this one's, with its data, or that of a run to come. On a GPU only
    what tensors take counts."""
    if work.device_type != "cpu":
        return GPU_BASE_BYTES
    later = LATER_BYTES + (KEPT_PRODUCTS * PRODUCT_BYTES if work.product_item < 4 else 0)
    if is_running:
        return int(psutil.Process().memory_info().rss) + later
    return program_bytes() + DATA_BYTES + TOKENIZER_BYTES * shapes.vocabulary + later


def _reached_bytes(device: torch.device) -> int:
    """The most that this process has had so far, on a CPU."""
    return peak_memory_bytes(device) if device.type == "cpu" else 0


@dataclass(slots=True)
class Followed:
    """A plan, put into effect on a model once there is one, with what to do when it proves too generous."""

    planner: Planner
    work: Workload
    plan: Plan
    budget: int
    allowed: tuple[Policy, ...]
    console: Console
    model: "DecoderForCausalLM | None" = None

    @property
    def answers_at_once(self) -> int:
        """How many questions are answered together within the planned peak."""
        return most_answers(self.planner.shapes, self.work, self.planner.base, self.plan.peak)

    def apply_to(self, model: "DecoderForCausalLM") -> None:
        """Give every layer of the model, which has its adapters already, its policy."""
        self.model = model
        model.set_policies(self.plan.policies)
        if self.plan.work.has_outer_embedding:
            model.model.offload_embedding()
        if self.plan.work.device_type == "cpu":
            set_heap("return" if self.plan.work.returns_memory else "reuse")
        if can_replay(model) and Policy.OFFLOAD not in self.plan.policies:
            model.model.use_graphs(self.work.tokens)
        else:
            model.model.graphs = None

    def step_leaner(self) -> bool:
        """Take the fastest plan with a peak at least a tenth lower, or the leanest; False where there is none."""
        assert self.model is not None
        least = least_peak(self.planner.shapes, self.work, self.allowed, self.planner.base)
        leaner = None
        if least < self.plan.training:
            leaner = self.planner.best(self.work, max(least, int(0.9 * self.plan.training)), self.allowed)
        if leaner is None:
            return False
        self.console.print(
            f"out of memory at a planned peak of {human_bytes(self.plan.peak)}: the step is repeated with a plan of "
            f"{human_bytes(leaner.peak)}",
            highlight=False,
        )
        self.plan = leaner
        self.apply_to(self.model)
        return True

    def outcome(
        self, peak_bytes: int, training_peak_bytes: int, tokens_per_second: float | None
    ) -> list[str]:
        """Predicted against measured; a step's seconds at the measured speed.

        If the peak had been reached before the plan was made, only that of training was predicted.
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
            lines.append(f"a full step: {predicted} predicted, {measured} measured")
        return lines


def can_replay(model: "DecoderForCausalLM") -> bool:
    """Whether steps may run as CUDA graphs: on one GPU, and with nothing random in them. (Several processes sum their
    gradients as autograd hands them out, which a graph does not.)"""
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return model.device.type == "cuda" and is_alone() and not drops and not model.config.attention_dropout


def follow(
    options: TrainOptions,
    stored: StoredModel,
    device: torch.device,
    lengths: Sequence[Sequence[int]],
    console: Console,
    held_out_lengths: Sequence[int] = (),
    answered_tokens: int = 0,
) -> Followed:
    """Plan the run before its model is loaded, and print the plan.

    lengths: of the documents of each pack; held_out_lengths: of each held-out pack. answered_tokens: of the longest
    question with its answer.
    """
    assert options.batch_size
    free = free_bytes(device)
    work = _workload(
        options,
        stored,
        device,
        tokens=options.batch_size * max(sum(pack) for pack in lengths),
        documents=max(1, round(options.batch_size * sum(map(len, lengths)) / len(lengths))),
    )
    evaluated = options.batch_size * max(held_out_lengths, default=0)
    work = replace(work, evaluated_tokens=evaluated, answered_tokens=answered_tokens)
    followed = _choose(options, stored.config, lambda: stored.config, work, console)
    show_plan(followed.plan, console, work=work, budget=followed.budget)
    if followed.budget > free:
        console.print(
            f"--memory {options.memory} is more than the {human_bytes(free)} that are free: a run that takes more than "
            "the machine has may be killed",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return followed
