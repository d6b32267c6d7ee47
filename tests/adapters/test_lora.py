"""Stock PEFT on a stock model is the oracle: the same adapter gives the same logits and gradients here."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import fettle.adapters.lora
import fettle.models.mlp
import fettle.models.projections
from fettle.adapters.lora import LoraLinear, adapt, attach
from fettle.errors import UserError

LOGITS = 1e-5  # absolute, fp32
GRADIENT = 1e-4  # relative to the gradient's norm

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprec"
    ),
    pytest.mark.filterwarnings("ignore:Could not find a config file in the-base"),
    pytest.mark.filterwarnings("ignore::peft.PeftWarning"),  # of lora_bias, said of every adapter that has it
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
    pytest.mark.filterwarnings("ignore:The PEFT config's .base_model_name_or_path. was renamed"),
]


@torch.no_grad()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)


def gradients_of(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """After one backward pass in training mode, from the same random state for everyone."""
    model.zero_grad()
    torch.manual_seed(3)
    model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < GRADIENT, f"{name}: {error:.1e}"


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every adapted layer that goes through fettle's own functions."""
    calls: list[int] = []
    linear, whole = fettle.adapters.lora.lora_linear, fettle.models.mlp.lora_mlp
    several = fettle.models.projections.lora_linears

    def count_several(x: torch.Tensor, layers: Any) -> Any:
        calls.extend(1 for layer in layers if layer.update)
        return several(x, layers)

    def count_linear(*args: Any) -> torch.Tensor:
        calls.append(1)
        return linear(*args)

    def count_whole(x: torch.Tensor, mlp: Any, **options: Any) -> torch.Tensor:
        calls.extend(1 for projection in (*mlp.gate_up, mlp.down) if projection.update)
        return whole(x, mlp, **options)

    monkeypatch.setattr(fettle.adapters.lora, "lora_linear", count_linear)
    monkeypatch.setattr(fettle.models.mlp, "lora_mlp", count_whole)
    monkeypatch.setattr(fettle.models.projections, "lora_linears", count_several)
    return calls


def ours_like(theirs: PeftModel, base: nn.Module, folder: Path, *, is_trainable: bool = True) -> PeftModel:
    """The adapter of `theirs`, saved by PEFT and attached to our base."""
    theirs.save_pretrained(folder)
    return attach(base, folder, is_trainable=is_trainable)  # type: ignore[arg-type]


def layers_of(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


# --- adapt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_the_same_adapter_gives_the_same(
    bases: Any, tokens: torch.Tensor, peft_adapted: Any, fast_calls: list[int], use_rslora: bool
) -> None:
    theirs = peft_adapted(bases.stock, use_rslora=use_rslora)
    ours = adapt(bases.ours, rank=4, alpha=6, use_rslora=use_rslora)
    state = get_peft_model_state_dict(theirs)
    assert get_peft_model_state_dict(ours).keys() == state.keys()
    set_peft_model_state_dict(ours, state)
    expected = logits_of(theirs, tokens)
    assert (expected - logits_of(theirs.get_base_model(), tokens)).abs().max() < 1e-9
    with theirs.disable_adapter():
        assert (expected - logits_of(theirs, tokens)).abs().max() > 0.1, "the adapter does nothing"
    assert_close(logits_of(ours, tokens), expected)
    assert len(fast_calls) == len(layers_of(ours)) > 0
    assert_same_gradients(gradients_of(ours, tokens), gradients_of(theirs, tokens))
    assert len(fast_calls) == 2 * len(layers_of(ours))


def test_only_the_adapter_is_trained(bases: Any, tokens: torch.Tensor) -> None:
    ours = adapt(bases.ours, rank=3)
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
    assert all(".lora_" in name for name in gradients_of(ours, tokens))
    linear = {n for n, m in bases.stock.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert len(layers_of(ours)) == len(linear)


def test_a_fresh_adapter_changes_nothing(bases: Any, tokens: torch.Tensor) -> None:
    expected = logits_of(bases.stock, tokens)
    assert_close(logits_of(adapt(bases.ours, rank=3), tokens), expected)


def test_a_rank_stabilized_scale_is_one_at_rank_16_unless_alpha_is_given(bases_of: Any) -> None:
    for rank, scale in ((16, 1.0), (64, 0.5)):
        layers = layers_of(adapt(bases_of("phi3").ours, rank=rank, use_rslora=True))
        assert {layer.scaling["default"] for layer in layers} == {scale}


def test_alpha_is_the_rank_unless_given(phi3: Any) -> None:
    ours = adapt(phi3.ours, rank=3, target_modules=["qkv_proj"])
    assert {layer.scaling["default"] for layer in layers_of(ours)} == {1.0}
    assert len(layers_of(ours)) == 2


def test_checkpointing_changes_no_gradient(bases: Any, tokens: torch.Tensor, randomise_adapter: Any) -> None:
    ours = adapt(bases.ours, rank=4)
    randomise_adapter(ours)
    kept = gradients_of(ours, tokens)
    ours.gradient_checkpointing_enable()
    again = gradients_of(ours, tokens)
    assert_same_gradients(again, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_stay_fp32_over_narrow_weights(
    bases: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    theirs = peft_adapted(bases.stock)
    exact = logits_of(theirs, tokens)
    theirs.get_base_model().to(dtype)
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.data.float() if ".lora_" in name else parameter.data
    ours = adapt(bases.ours.to(dtype), rank=4, alpha=6)
    set_peft_model_state_dict(ours, get_peft_model_state_dict(theirs))
    adapter = {name: p for name, p in ours.named_parameters() if ".lora_" in name}
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    # as near to the exact answer as PEFT, which computes the update in fp32
    error = (logits_of(ours, tokens).float() - exact).norm()
    assert error < 1.25 * (logits_of(theirs, tokens).float() - exact).norm()
    assert {g.dtype for g in gradients_of(ours, tokens).values()} == {torch.float32}
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


@pytest.mark.parametrize("targets", ["nonsense", ["q_proj", "v_proj"], []], ids=str)
def test_targets_that_the_model_does_not_have(phi3: Any, targets: Any) -> None:
    """Phi-3 has one qkv_proj."""
    with pytest.raises(UserError, match=r"^target_modules\b") as refused:
        adapt(phi3.ours, target_modules=targets)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("targets", [["lm_head"], ["down_proj", "lm_head"], ".*(head|down_proj)"], ids=str)
def test_the_output_head_is_not_adapted(bases: Any, targets: Any) -> None:
    before = {name: type(module) for name, module in bases.ours.named_modules()}
    with pytest.raises(UserError, match="'lm_head' is the model's output head") as refused:
        adapt(bases.ours, target_modules=targets)
    assert "\n" not in str(refused.value)
    assert {name: type(module) for name, module in bases.ours.named_modules()} == before


def test_packed_rows_pass_through_an_adapter(phi3: Any, tokens: torch.Tensor, randomise_adapter: Any) -> None:
    ours = adapt(phi3.ours, rank=4)
    randomise_adapter(ours)
    positions = torch.cat([torch.arange(13), torch.arange(8)])[None].expand(2, -1)
    with torch.no_grad():
        packed = ours.eval()(tokens, position_ids=positions, use_cache=False).logits
    assert_close(packed[:, 13:], logits_of(ours, tokens[:, 13:]))
    assert_close(packed[:, :13], logits_of(ours, tokens[:, :13]))


def test_generation_with_an_adapter(
    bases: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path
) -> None:
    theirs = peft_adapted(bases.stock)
    ours = ours_like(theirs, bases.ours, tmp_path)
    said = [
        model.eval().generate(input_ids=tokens, do_sample=False, max_new_tokens=24, min_new_tokens=24)
        for model in (theirs, ours)
    ]
    assert said[0].tolist() == said[1].tolist()


# --- folders -----------------------------------------------------------------------------------------------


def test_a_folder_of_ours_opens_in_plain_peft(
    bases: Any, tokens: torch.Tensor, randomise_adapter: Any, tmp_path: Path
) -> None:
    ours = adapt(bases.ours, rank=4, alpha=6, dropout=0.1)
    randomise_adapter(ours)
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(bases.stock, tmp_path)
    assert not layers_of(theirs)
    assert_close(logits_of(ours, tokens), logits_of(theirs, tokens))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "custom" not in json.dumps(written)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_dropout": 0.3},
        {"lora_dropout": 0.3, "use_dora": True},
        {"lora_bias": True},
        {"bias": "all", "target_modules": "all-linear"},
        {"bias": "lora_only"},
        {"task_type": None},
        {
            "target_modules": ["down_proj", "o_proj"],
            "rank_pattern": {"o_proj": 7},
            "alpha_pattern": {"o_proj": 2},
        },
        {"target_modules": ["down_proj", "embed_tokens"]},
        {"target_modules": ["down_proj", "lm_head"]},
        {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["down_proj"], "trainable_token_indices": [5, 40, 41]},
        {"target_parameters": ["mlp.down_proj.weight"], "target_modules": ["o_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["phi3", "qwen2"])
def test_a_folder_of_plain_peft_opens_here(
    bases_of: Any,
    tokens: torch.Tensor,
    peft_adapted: Any,
    tmp_path: Path,
    family: str,
    options: dict[str, Any],
) -> None:
    """Whatever the fast path does not cover is PEFT's own to do: logits, and gradients to train on."""
    bases = bases_of(family)
    theirs = peft_adapted(bases.stock, **options)
    ours = ours_like(theirs, bases.ours, tmp_path)
    assert_close(logits_of(ours, tokens), logits_of(theirs, tokens))
    assert_same_gradients(gradients_of(ours, tokens), gradients_of(theirs, tokens))


def test_an_adapter_is_attached_to_use_or_to_train_on(phi3: Any, peft_adapted: Any, tmp_path: Path) -> None:
    theirs = peft_adapted(phi3.stock)
    ours = ours_like(theirs, phi3.ours, tmp_path, is_trainable=False)
    assert not any(p.requires_grad for p in ours.parameters())


# --- what PEFT's own forward has to do ---------------------------------------------------------------------


def test_dropout_drops_as_in_peft(phi3: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path) -> None:
    theirs = peft_adapted(phi3.stock, lora_dropout=0.5)
    ours = ours_like(theirs, phi3.ours, tmp_path)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        losses.append(model.train()(tokens, labels=tokens).loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)  # attention is ours
    plain = ours.eval()(tokens, labels=tokens).loss.detach()
    assert abs(plain - losses[1]) > 1e-3, "nothing was dropped"


def test_disable_adapter(phi3: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path) -> None:
    base = logits_of(phi3.ours, tokens)
    theirs = peft_adapted(phi3.stock)
    ours = ours_like(theirs, phi3.ours, tmp_path)
    with ours.disable_adapter():
        assert torch.equal(logits_of(ours, tokens), base)
    assert_close(logits_of(ours, tokens), logits_of(theirs, tokens))


def test_several_adapters(phi3: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path) -> None:
    theirs = peft_adapted(phi3.stock)
    torch.manual_seed(11)
    theirs.add_adapter("second", theirs.peft_config["default"])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".second." in name:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    ours = attach(phi3.ours, tmp_path)
    ours.load_adapter(str(tmp_path / "second"), "second")
    for active in ("default", "second", ["default", "second"], "default"):
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        assert_close(logits_of(ours, tokens), logits_of(theirs, tokens))
    mixed = ["default", "second"]
    with torch.no_grad():
        found, expected = (model.eval()(tokens, adapter_names=mixed).logits for model in (ours, theirs))
    assert_close(found, expected)


def test_merged_and_back(bases: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path) -> None:
    theirs = peft_adapted(bases.stock)
    ours = ours_like(theirs, bases.ours, tmp_path)
    expected = logits_of(theirs, tokens)
    ours.merge_adapter()
    assert_close(logits_of(ours, tokens), expected)
    ours.unmerge_adapter()
    assert_close(logits_of(ours, tokens), expected)
    merged = ours.merge_and_unload()
    assert type(merged) is type(bases.ours)
    assert not layers_of(merged)
    assert_close(logits_of(merged, tokens), expected)


def test_autocast_is_left_to_peft(
    phi3: Any, tokens: torch.Tensor, peft_adapted: Any, tmp_path: Path, fast_calls: list[int]
) -> None:
    theirs = peft_adapted(phi3.stock)
    ours = ours_like(theirs, phi3.ours, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients_of(model, tokens) for model in (ours, theirs))
    assert not fast_calls
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() / expected[name].norm() < 0.05, name


@pytest.mark.parametrize(
    ("options", "is_training", "is_fast"),
    [
        ({}, True, True),
        ({}, False, True),
        ({"use_rslora": True}, True, True),
        ({"lora_dropout": 0.1}, True, False),
        ({"lora_dropout": 0.1}, False, True),
        ({"use_dora": True}, True, False),
        ({"lora_bias": True}, True, False),
        ({"bias": "all"}, True, False),
    ],
    ids=str,
)
def test_where_the_fast_path_runs(
    bases_of: Any,
    tokens: torch.Tensor,
    peft_adapted: Any,
    tmp_path: Path,
    fast_calls: list[int],
    options: dict[str, Any],
    is_training: bool,
    is_fast: bool,
) -> None:
    bases = bases_of("qwen2")
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj"]}  # qwen2's layers with a bias
    ours = ours_like(peft_adapted(bases.stock, **targets | options), bases.ours, tmp_path)
    with nullcontext() if is_training else torch.no_grad():
        ours.train(is_training)(tokens)
    assert len(fast_calls) == (6 if is_fast else 0)


# --- the wrong base ----------------------------------------------------------------------------------------


def refusal(base: nn.Module, folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        attach(base, folder)  # type: ignore[arg-type]
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.fixture
def adapter_folder(phi3: Any, peft_adapted: Callable[..., PeftModel], tmp_path: Path) -> Path:
    """A LoRA adapter for the Phi-3 base of two layers, its targets named by their ends, as most are."""
    peft_adapted(phi3.stock, target_modules=["qkv_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_base_of_another_width(adapter_folder: Path, bases_of: Any) -> None:
    message = refusal(bases_of("phi3", hidden=64).ours, adapter_folder)
    assert "another model" in message
    assert "32" in message and "64" in message


def test_a_base_of_another_family(adapter_folder: Path, bases_of: Any) -> None:
    message = refusal(bases_of("llama").ours, adapter_folder)
    assert "another model" in message
    assert "layers.0" in message


def test_a_base_with_fewer_layers(adapter_folder: Path, bases_of: Any) -> None:
    assert "layers.1" in refusal(bases_of("phi3", layers=1).ours, adapter_folder)


def test_a_base_with_more_layers(adapter_folder: Path, bases_of: Any) -> None:
    """Half of the model would silently stay as it was."""
    assert "layers.2" in refusal(bases_of("phi3", layers=3).ours, adapter_folder)


def test_an_adapter_that_is_no_lora(phi3: Any, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["qkv_proj"],
        feedforward_modules=[],
        base_model_name_or_path="x",
    )
    get_peft_model(phi3.stock, config).save_pretrained(tmp_path)
    assert "LoRA" in refusal(phi3.ours, tmp_path)


def test_a_refused_base_is_left_as_it_was(adapter_folder: Path, bases_of: Any) -> None:
    base = bases_of("llama").ours
    refusal(base, adapter_folder)
    assert not layers_of(base)


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "NONSENSE"},
        {"peft_type": None},
        {"r": 8},
        {"r": "four"},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": 1e308},
        {"lora_alpha": 10**400},
        {"target_modules": ["nonsense"]},
        {"target_modules": ["qkv_proj"]},
        {"target_modules": ["qkv_proj", "down_proj", "o_proj"]},
        {"target_modules": None},
        {"use_dora": True},
        {"task_type": "NONSENSE"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights(
    adapter_folder: Path, phi3: Any, values: dict[str, Any]
) -> None:
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    assert "adapter_config.json" in refusal(phi3.ours, adapter_folder)
