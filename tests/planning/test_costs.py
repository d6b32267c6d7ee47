"""What is counted from a config against what PyTorch really holds and saves."""

from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

from fettle.adapters.lora import adapt
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.models.families import FAMILIES
from fettle.ops.token_log_probs import token_log_probs
from fettle.planning.costs import (
    StepMemory,
    Workload,
    kept_by_layer,
    scratch_bytes,
    trained_bytes,
    weight_bytes,
)
from fettle.planning.plan import allowed_policies
from fettle.planning.program import peak_memory_bytes, reset_peak_memory
from fettle.planning.shapes import Shapes
from fettle.quantization.layers import quantize_linears
from fettle.recompute.allocator import release_unused
from fettle.recompute.norm_outputs import RecomputedOutputs
from fettle.recompute.policies import Policy

TOKENS = 640
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": True}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24}),
    ("qwen3", {"attention_bias": True, "head_dim": 24}),
    ("gemma2", {"attention_bias": True, "head_dim": 24}),
]


def config_of(family: str, **options: Any) -> PreTrainedConfig:
    return FAMILIES[family].config(**{**SIZES, **options})


def empty_model(family: str, config: PreTrainedConfig) -> DecoderForCausalLM:
    with torch.device("meta"):
        return causal_lm_class(family)(config)


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=str)
def test_parameters_are_the_models(family: str, options: dict[str, Any]) -> None:
    config = config_of(family, **options)
    model = empty_model(family, config)
    model.tie_weights()
    assert Shapes.of(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_parameters_are_those_that_are_trained(family: str) -> None:
    config = config_of(family)
    shapes = Shapes.of(config)
    some = ["o_proj", "down_proj"]
    for targets, named in (("all-linear", None), (some, some)):
        adapted = adapt(empty_model(family, config), rank=3, target_modules=targets)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        layers = None if named is None else dict.fromkeys(named, 2)
        assert shapes.adapter_parameters(3, layers) == count
        work = Workload(tokens=1, rank=3, targets=layers)
        assert trained_bytes(shapes, work) == (4 * count, 4 * count, 8 * count)


@pytest.mark.parametrize("is_nf4", [False, True])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_weight_bytes_are_the_models(family: str, is_nf4: bool) -> None:
    config = config_of(family, hidden_size=256, intermediate_size=512)
    model = causal_lm_class(family)(config).to(torch.bfloat16)
    if is_nf4:
        quantize_linears(model)
    work = Workload(tokens=1, is_nf4=is_nf4)
    found = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    # 1 KB a layer of NF4 is its map of 256 values, which all layers share
    maps = sum(t.numel() * 4 for name, t in model.named_buffers() if name.endswith("nested_quant_map"))
    counted = weight_bytes(Shapes.of(config), work)
    assert counted == pytest.approx(found - maps, rel=0.01)


KEPT: dict[str, PreTrainedConfig] = {
    name: family.config(**SIZES, head_dim=16) for name, family in FAMILIES.items()
}
BIASED = LlamaConfig(**SIZES, mlp_bias=True)


def saved_bytes(family: str, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> int:
    """The distinct storages that autograd saves in one layer's forward pass, but for weights and positions."""
    model = causal_lm_class(family)(KEPT[family]).to(torch.bfloat16)
    adapted = adapt(model, rank=2).train()
    model.set_policies([policy] * len(model.model.layers))
    layer = model.model.layers[0]
    x = torch.randn(1, TOKENS, SIZES["hidden_size"]).bfloat16().requires_grad_()
    seen: dict[str, Any] = {}

    def catch(_: Any, args: Any) -> None:
        seen["context"] = args[1]

    handle = layer.register_forward_pre_hook(catch)
    with torch.no_grad():
        model.model(inputs_embeds=x, use_cache=False)
    handle.remove()
    known = {t.untyped_storage().data_ptr() for t in [*adapted.parameters(), *seen["context"].rotation]}
    known |= {v.untyped_storage().data_ptr() for v in vars_of(seen["context"].documents)}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    pack = RecomputedOutputs._pack

    def note_what_is_packed(self: RecomputedOutputs, tensor: torch.Tensor) -> Any:
        packed = pack(self, tensor)
        note(packed if isinstance(packed, torch.Tensor) else packed[0].x)
        return packed

    monkeypatch.setattr(RecomputedOutputs, "_pack", note_what_is_packed)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x, **seen)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def vars_of(documents: Any) -> list[torch.Tensor]:
    names = getattr(documents, "__dataclass_fields__", {})
    values = (getattr(documents, name) for name in names)
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    "policy", [Policy.KEEP, Policy.RECOMPUTE_NORMS, Policy.RECOMPUTE_MLP], ids=lambda p: p.name
)
@pytest.mark.parametrize("family", KEPT)
def test_kept_bytes_are_those_that_autograd_saves(
    family: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = kept_by_layer(Shapes.of(KEPT[family]), Workload(tokens=TOKENS, rank=2), policy)
    assert counted == pytest.approx(saved_bytes(family, policy, monkeypatch), rel=0.02)


def test_leaner_policies_keep_less_and_peak_lower() -> None:
    shapes, work = Shapes.of(KEPT["phi3"]), Workload(tokens=TOKENS)
    kept = {policy: kept_by_layer(shapes, work, policy) for policy in Policy}
    sizes = list(kept.values())
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
    for policy in Policy:
        total, peak = StepMemory.of(shapes, work).peak([(policy, 2)])
        assert total == 2 * kept[policy] < peak


@pytest.mark.parametrize("config", [BIASED, LlamaConfig(**SIZES, hidden_act="relu")], ids=["bias", "relu"])
def test_an_mlp_that_runs_by_its_modules_is_planned_so(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, work = Shapes.of(config), Workload(tokens=TOKENS, rank=2)
    assert Policy.RECOMPUTE_MLP not in allowed_policies(shapes, work, None)
    monkeypatch.setitem(KEPT, "llama", config)
    counted = kept_by_layer(shapes, work, Policy.KEEP)
    assert counted == pytest.approx(saved_bytes("llama", Policy.KEEP, monkeypatch), rel=0.03)


def test_a_wide_capped_head_takes_no_more_than_is_counted() -> None:
    """Measured on the process: the logits of a chunk exist three times, whatever the vocabulary."""
    config = config_of("gemma2", vocab_size=128_000, head_dim=16)
    weight = torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
    labels = torch.zeros(TOKENS, dtype=torch.long)
    work = Workload(tokens=TOKENS)

    def run() -> None:
        hidden = torch.zeros(TOKENS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        token_log_probs(hidden, weight, labels, softcap=30.0).log_probs.sum().backward()

    release_unused()
    reset_peak_memory(torch.device("cpu"))
    before = psutil.Process().memory_info().rss
    run()
    grown = peak_memory_bytes(torch.device("cpu")) - before
    counted = scratch_bytes(Shapes.of(config), work)
    assert 0.9 * counted < grown < counted + 30_000_000
