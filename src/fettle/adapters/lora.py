"""LoRA through PEFT's own hook: PEFT owns the format, the names and the file; fettle does the arithmetic.

`LoraConfig._register_custom_module` makes PEFT wrap every targeted `nn.Linear` in `LoraLinear`, a subclass of PEFT's
own layer. So a plain PEFT adapter is saved, and cases that the fast path does not cover (several adapters at once,
dropout, DoRA, a merged layer) fall back to PEFT's forward.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from fettle.adapters.mixed import MixedAdapters, current_mixed
from fettle.checkpoints.adapter_facts import read_facts
from fettle.checkpoints.folder import ADAPTER_WEIGHTS, read_adapter_config
from fettle.checkpoints.safetensors_header import read_places
from fettle.errors import UserError, option, reason_of
from fettle.ops import lora_linear
from fettle.ops.lora_linear import LowRank, Projection, frozen_linear, product_rows
from fettle.quantization.layers import matrix_of
from fettle.quantization.nf4 import Nf4Linear

TensorShapes = dict[str, tuple[int, ...]]
"""Shapes of an adapter's tensors, by name."""

PLAIN_OPTIONS = {
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "eva_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"),
}
"""Options of an adapter that keep it plain LoRA whatever their value."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not change the base's weights; PiSSA and similar ones do."""

RSLORA_ALPHA = 4
"""The default alpha with `use_rslora`: a scale of one at rank 16, for which the default learning rates are meant."""

LARGEST_ALPHA = 1e30
"""alpha / rank multiplies in fp32, which ends at 3e38."""


class LoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer with `fettle.ops.lora_linear` in the common case."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (mixed := current_mixed()) is not None:
            return self._forward_mixed(x, mixed)
        base, name = self.get_base_layer(), self._fast_adapter(args, kwargs)
        if name is None and self._is_off and not args and not kwargs:
            rows = product_rows(x)
            output = frozen_linear(rows, matrix_of(base), base.bias)
            return output.to(x.dtype).view(*x.shape[:-1], -1)
        if name is None:
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        return lora_linear(x, matrix_of(base), base.bias, lora_a, lora_b, self.scaling[name])

    def _forward_mixed(self, x: torch.Tensor, mixed: MixedAdapters) -> torch.Tensor:
        """Every adapter's update is computed for all rows and masked: a step has few rows, and a graph fixed shapes."""
        base, rows = self.get_base_layer(), product_rows(x)
        output = frozen_linear(rows, matrix_of(base), base.bias)
        for index, name in enumerate(mixed.names):
            if name in self.lora_A:
                update = LowRank(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
                update.add_to(output, update.middle(rows) * (mixed.rows == index)[:, None])
        return output.to(x.dtype).view(*x.shape[:-1], -1)

    def projection(self) -> Projection | None:
        """Return the layer as an input of the ops, or None if the layer's own forward must run."""
        if current_mixed() is not None:
            return None
        name, base = self._fast_adapter((), {}), self.get_base_layer()
        if name is None:
            return Projection(matrix_of(base), None, base.bias) if self._is_off else None
        update = LowRank(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
        return Projection(matrix_of(base), update, base.bias)

    @property
    def _is_off(self) -> bool:
        """Whether a pass without gradient uses the frozen matrix alone, such as that of a reference model."""
        is_plain = self.disable_adapters and not self.merged and not torch.is_grad_enabled()
        return is_plain and self._is_covered

    def _fast_adapter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return the name of the single adapter that the fast path covers, or None if PEFT's forward must run."""
        if args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        has_dropout = self.training and not isinstance(self.lora_dropout[name], nn.Identity)
        return name if self._is_covered and not has_dropout else None

    @property
    def _is_covered(self) -> bool:
        """Whether fettle's ops know the frozen layer."""
        base = self.get_base_layer()
        weight, bias = base.weight, base.bias
        is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        # Under autocast, forward and backward would run in different dtypes. A CPU product with a meta weight
        # returns garbage instead of failing.
        is_unsafe = torch.is_autocast_enabled(weight.device.type) or weight.is_meta
        return type(base) in (nn.Linear, Nf4Linear) and is_frozen and not is_unsafe


def adapt(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    use_rslora: bool = False,
) -> PeftModel:
    """Freeze the model and add a trainable LoRA adapter; return PEFT's own model object, in training mode.

    alpha: the update is scaled by alpha / rank; None means alpha = rank, a scale of one. use_rslora: the scale is
    alpha / sqrt(rank) instead (Kalajdzievski, 2023, arXiv 2312.03732); None then means RSLORA_ALPHA. The adapter's
    weights are fp32 for any model dtype, as rounding to bf16 would lose small optimizer steps.
    Raises UserError if a target module is not a linear layer of the model or is its output head, and for a GGUF file.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{getattr(model, 'path', 'The model')} is a GGUF file, whose weights cannot be trained: load the folder "
            "or hub name it was made from."
        )
    require_targets(model, target_modules)
    if alpha is None:
        alpha = RSLORA_ALPHA if use_rslora else rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        use_rslora=use_rslora,
    )
    _use_our_layer(config)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{option('target_modules')} {target_modules!r}: {reason_of(error)}") from error
    return adapted.train()  # PEFT's wrapper is in training mode, but its base still in that of loading


def require_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    """Raise UserError for a target that matches no linear layer, and for the output head.

    PEFT accepts unknown names as long as one target matches. The training loss reads only the head's own weights, so
    an adapter on it would have no effect.
    """
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for target in [] if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = dict.fromkeys(name.rpartition(".")[2] for name in linear if modules[name] is not head)
            raise UserError(
                f"{option('target_modules')}: the model has no linear layer '{target}'; it has {', '.join(known)}."
            )
    config = LoraConfig(target_modules=targets)
    for name, module in modules.items():
        if module is head and check_target_module_exists(config, name):
            raise UserError(
                f"{option('target_modules')}: '{name}' is the model's output head, which cannot be adapted; "
                "leave it out."
            )


def attach(
    model: PreTrainedModel | PeftModel, folder: Path, *, name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Load a PEFT adapter folder, written by fettle or PEFT, onto its base model; in training mode if `is_trainable`.

    A PeftModel keeps its adapters and its active one; requests to an engine choose by `name`. Raises UserError if the
    adapter belongs to another model: if a layer is missing from the model, has a different shape, or is missing from
    the adapter.
    """
    folder = Path(folder)
    if not name or "." in name:
        raise UserError(
            f"{name!r} cannot be the name of an adapter; expected letters and digits, without dots."
        )
    read_adapter_config(folder)
    shapes = shapes_in(folder)
    is_first = not isinstance(model, PeftModel)
    require_fit(model if is_first else model.get_base_model(), shapes, folder)
    config = adapter_config_of(folder)
    _use_our_layer(config)
    if not is_first and name in model.peft_config:
        raise UserError(f"{folder}: the model already has an adapter {name!r}; give this one another name.")
    _require_context(model, folder, is_first)
    try:
        with _values_of(folder):
            if is_first:
                adapted = PeftModel.from_pretrained(model, str(folder), name, is_trainable, config=config)
            else:
                adapted = model
                adapted.add_adapter(name, config)
                adapted.load_adapter(str(folder), name, is_trainable=is_trainable)
        _require_all(adapted, shapes, folder, name)
    except UserError:
        if not is_first and name in model.peft_config:
            model.delete_adapter(name)
        raise
    return adapted.train(is_trainable)  # wrapper and base alike


def _require_context(model: PreTrainedModel | PeftModel, folder: Path, is_first: bool) -> None:
    """Use the LongRoPE factors that the adapter was trained with. Raises UserError if another adapter needs others."""
    facts = read_facts(folder)
    base = model if is_first else model.get_base_model()
    if facts is None or not hasattr(base, "set_context"):
        return
    if is_first:
        base.set_context(facts.context_tokens)
    elif facts.context_tokens != (found := base.model.rotary_emb.context_tokens):
        raise UserError(
            f"{folder}: the adapter was trained for a context of {facts.context_tokens} tokens, the model's other "
            f"adapter for one of {found}, and LongRoPE's factors depend on it: they cannot share a base."
        )


def require_mixable(model: PeftModel) -> None:
    """Raise UserError if one of the model's adapters cannot run beside others: if it is more than plain LoRA."""
    for name, config in model.peft_config.items():
        if not isinstance(config, LoraConfig) or not is_plain_lora(config, ()):
            raise UserError(f"the adapter {name!r} is more than plain LoRA, so it cannot run beside others.")
    for module in model.modules():
        if isinstance(module, LoraLayer) and (not isinstance(module, LoraLinear) or module.merged):
            raise UserError(
                "an adapter is merged or adapts other layers than linear ones, so none can run beside it."
            )


@contextmanager
def _values_of(folder: Path) -> Iterator[None]:
    """Convert PEFT's exceptions for invalid values into a UserError that names adapter_config.json."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        re.error,
    ) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: {reason_of(error)}") from error


def adapter_config_of(folder: Path) -> LoraConfig:
    """Return the folder's adapter_config.json; UserError if it is not that of a LoRA adapter."""
    file = folder / "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a valid PEFT config: {reason_of(error)}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{file}: the adapter's type is {config.peft_type}; "
            "expected LoRA (use PEFT itself for other types)."
        )
    alpha = config.lora_alpha
    if isinstance(alpha, int | float) and not abs(alpha) <= LARGEST_ALPHA:  # also true for NaN
        raise UserError(f"{file}: lora_alpha is {alpha}; expected at most {LARGEST_ALPHA:g}.")
    tokens = config.alora_invocation_tokens
    is_plain_list = isinstance(tokens, list) and all(
        type(token) is int and 0 <= token < 2**31 for token in tokens
    )
    if tokens is not None and not (tokens and is_plain_list):
        raise UserError(
            f"{file}: alora_invocation_tokens is {tokens!r}; expected a list of token ids, or null."
        )
    return config


def shapes_in(folder: Path) -> TensorShapes:
    """Return the shapes of an adapter folder's tensors, by name."""
    return {name: place.header.shape for name, place in read_places(folder / ADAPTER_WEIGHTS).items()}


def is_plain_lora(config: LoraConfig, names: Iterable[str]) -> bool:
    """Whether an adapter is W + scale * B A on linear layers and nothing else.

    names: of its tensors. Every option outside PLAIN_OPTIONS must have its default value, including options that
    future releases of PEFT may add.
    """
    usual = vars(LoraConfig())
    is_usual = all(
        (value or None) == (usual.get(option) or None)
        for option, value in vars(config).items()
        if option not in PLAIN_OPTIONS and not option.startswith("_")
    )
    is_matrices = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    return is_usual and is_matrices and config.init_lora_weights in PLAIN_STARTS


def _use_our_layer(config: LoraConfig) -> None:
    config._register_custom_module({nn.Linear: LoraLinear, Nf4Linear: LoraLinear})


def require_fit(model: PreTrainedModel, shapes: TensorShapes, folder: Path) -> None:
    """Compare every lora_A and lora_B matrix with the linear layer it is meant for."""
    modules, owner = dict(model.named_modules()), model.name_or_path or "its base"
    for name, shape in shapes.items():
        target, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not part.startswith(("A.weight", "B.weight")):
            continue
        layer = modules.get(target)
        layer = getattr(layer, "base_layer", layer)  # of a model that has adapters
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"{folder}: the adapter belongs to another model: it adapts '{target}', but "
                f"{owner} has no such linear layer."
            )
        found, expected = (shape[1], layer.in_features) if part[0] == "A" else (shape[0], layer.out_features)
        if found != expected:
            side = "inputs" if part[0] == "A" else "outputs"
            raise UserError(
                f"{folder}: the adapter belongs to another model: it expects {found} {side} at '{target}', "
                f"but {owner} has {expected}."
            )


def require_whole(model: PreTrainedModel, config: LoraConfig, shapes: TensorShapes, folder: Path) -> None:
    """Raise UserError if the folder's tensors are not exactly those that its config creates on the model.

    model: on the meta device; it is modified. config: of plain LoRA.
    """
    require_fit(model, shapes, folder)
    config = copy.deepcopy(config)  # PEFT modifies it
    config.init_lora_weights, config.base_model_name_or_path = False, None
    with _values_of(folder):
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    _require_all(adapted, shapes, folder)


def _require_all(adapted: PeftModel, shapes: TensorShapes, folder: Path, name: str = "default") -> None:
    """Raise UserError if the folder's tensors are not exactly those of the adapter; PEFT only warns."""
    state = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    # older releases wrote DoRA's magnitudes without the suffix
    expected, found = (
        {name.removesuffix(".weight"): each for name, each in names.items()}
        for names in ({name: tuple(t.shape) for name, t in state.items()}, shapes)
    )
    missing = expected.keys() - found.keys()
    # embeddings and modules saved whole have several spellings, which PEFT resolves
    others = ("embed_tokens", "lm_head", "modules_to_save", "token_adapter", "trainable_tokens", "base_layer")
    unused = {name for name in found.keys() - expected.keys() if not any(part in name for part in others)}
    if missing or unused:
        raise UserError(
            f"{folder}: the adapter belongs to another model than {adapted.get_base_model().name_or_path}, or "
            f"its adapter_config.json to another adapter: '{min(missing or unused)}' is "
            f"{'missing from' if missing else 'unexpected in'} its weights."
        )
    if wrong := [name for name in expected if expected[name] != found[name]]:
        raise UserError(
            f"{folder}: the adapter's weights and its adapter_config.json belong to different adapters: '{wrong[0]}' "
            f"has shape {found[wrong[0]]}, but the config implies {expected[wrong[0]]}; fetch both again."
        )
