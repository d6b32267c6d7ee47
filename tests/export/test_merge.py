"""A right merge passes in every type, and each way to get it wrong is found."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.adapters.lora import LoraLinear, adapt
from fettle.errors import UserError
from fettle.export.merge import (
    LOGIT_TOLERANCE,
    PROBES,
    expected_rows,
    merge,
    probe_logits,
    relative_difference,
)
from fettle.models.decoder import causal_lm_class
from fettle.models.load import load_model, load_tokenizer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(scope="module")
def tokenizer(small_model):
    return load_tokenizer(small_model)


@pytest.fixture
def adapted_of(small_model):
    """The small model in a type, with a random adapter whose update is `size` of the weights."""

    def make(dtype: torch.dtype, size: float = 0.1, **options) -> PeftModel:
        torch.manual_seed(1)
        name = str(dtype).removeprefix("torch.")
        model = adapt(load_model(small_model, dtype=name), rank=8, **options).eval()
        randomise(model, size)
        return model

    return make


@torch.no_grad()
def randomise(model: PeftModel, size: float) -> None:
    """Give an adapter of rank 8 random matrices whose update is `size` of weights of order inputs ** -0.5."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        elif "lora_B" in name:
            parameter.normal_(0, size * 8**-0.5)


@pytest.mark.parametrize("size", [0.01, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_model_says_what_the_adapter_model_said(adapted_of, tokenizer, dtype, size):
    model = adapted_of(dtype, size)
    before = probe_logits(model, tokenizer)
    with model.disable_adapter():
        bare = probe_logits(model, tokenizer)
    merged = merge(model, tokenizer)
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    after = probe_logits(merged, tokenizer)
    assert (
        max(map(relative_difference, after, before)) < LOGIT_TOLERANCE[dtype] / 3
    )  # there is room for depth
    assert max(map(relative_difference, bare, before)) > size
    assert [len(logits) for logits in after] == [len(tokenizer(text)["input_ids"]) for text in PROBES]


@pytest.mark.parametrize("layers", [2, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_depth_is_no_reason_to_refuse(small_model, tokenizer, dtype, layers):
    config = AutoConfig.from_pretrained(small_model, num_hidden_layers=layers)
    torch.manual_seed(0)
    base = causal_lm_class("phi3")(config)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model = adapt(base.to(dtype), rank=8).eval()
    randomise(model, size=0.1)
    merge(model, tokenizer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_merged_weight_is_the_exact_one_rounded_once(adapted_of, tokenizer, dtype):
    model = adapted_of(dtype)
    exact = {
        name: layer.get_base_layer().weight.double()
        + layer.scaling["default"]
        * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLinear)
    }
    merged = merge(model, tokenizer)
    for name, weight in exact.items():
        found = merged.get_submodule(name).weight.double()
        assert ((found - weight).abs() <= torch.finfo(dtype).eps * weight.abs() + 1e-6).all()


WRONG = {
    "one layer left out": lambda layer, delta: delta * (not layer.is_chosen),
    "scale doubled": lambda layer, delta: 2 * delta,
    "scale a tenth off": lambda layer, delta: 1.1 * delta,
    "sign turned": lambda layer, delta: -delta,
    "one layer broken": lambda layer, delta: delta.roll(1, 0) if layer.is_chosen else delta,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("wrong", "size"), [*((wrong, 0.1) for wrong in WRONG), ("one layer left out", 0.01)]
)
def test_a_wrong_merge_is_refused(adapted_of, tokenizer, monkeypatch, dtype, wrong, size):
    """Even where the adapter is small, and in bf16, whose rounding moves logits as much as a missing layer."""
    model = adapted_of(dtype, size)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.is_chosen = layer is layers[len(layers) // 2]
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(
        LoraLinear, "get_delta_weight", lambda layer, name: WRONG[wrong](layer, right(layer, name))
    )
    with pytest.raises(
        UserError, match=r"differs from the adapter model in the weights of 'model\.layers\."
    ) as e:
        merge(model, tokenizer)
    assert str(dtype).removeprefix("torch.") in str(e.value) and "nothing was written" in str(e.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_wrong_outside_the_adapted_weights_is_refused(adapted_of, tokenizer, monkeypatch, dtype):
    model = adapted_of(dtype)
    right = LoraModel.merge_and_unload

    def wrong(adapted):
        merged = right(adapted)
        merged.model.norm.weight.data[:8] *= -1  # a quarter of the channels
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(UserError, match="differs from the adapter model in its logits"):
        merge(model, tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_went_astray_is_named(adapted_of, tokenizer, value):
    model = adapted_of(torch.float32)
    model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.lora_B.default").weight.data[0] = value
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.down_proj' contain NaN or Inf"):
        merge(model, tokenizer)


def test_a_merge_into_not_a_number_is_refused(adapted_of, tokenizer, monkeypatch):
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, name: right(layer, name) * float("nan"))
    with pytest.raises(UserError, match=r"\((\d[\d,]*) of \1 compared\)"):
        merge(adapted_of(torch.float32), tokenizer)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha": 3}, {"target_modules": ["down_proj"]}])
def test_the_expected_rows_follow_the_adapters_settings(adapted_of, options):
    model = adapted_of(torch.float32, **options)
    rows = expected_rows(model)
    merged = model.merge_and_unload()
    for name, expected in rows.items():
        weight = merged.get_submodule(name).weight
        at = torch.linspace(0, weight.shape[0] - 1, min(16, weight.shape[0])).long()
        torch.testing.assert_close(weight[at], expected, rtol=0, atol=1e-6)
    assert len(rows) == (2 if "target_modules" in options else 8)


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings")
def test_a_head_tied_to_the_embedding_cannot_be_merged_unseen(small_model, tokenizer, tmp_path):
    """Merging into a tied head would change the embedding too: the logits tell."""
    config = AutoModelForCausalLM.from_pretrained(small_model).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    config = LoraConfig(r=8, target_modules=["lm_head"], task_type="CAUSAL_LM")  # as plain PEFT makes it
    model = get_peft_model(load_model(tmp_path), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    with pytest.raises(UserError, match="differs from the adapter model"):
        merge(model, tokenizer)


def test_dora_is_merged_and_checked_by_its_logits(small_model, tokenizer, monkeypatch):
    base = load_model(small_model)
    config = LoraConfig(r=4, use_dora=True, target_modules=["down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    before = probe_logits(model, tokenizer)
    merged = merge(model, tokenizer)
    assert max(map(relative_difference, probe_logits(merged, tokenizer), before)) < 1e-5


def test_a_kind_that_peft_cannot_merge_is_refused(small_model, tokenizer):
    config = LoraConfig(r=4, lora_bias=True, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"cannot be merged .* has no bias"):
        merge(get_peft_model(load_model(small_model), config).eval(), tokenizer)


def test_relative_difference():
    assert relative_difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
