"""Every policy gives the same losses and gradients, and keeps no more than it says."""

from collections.abc import Callable

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config

from fettle.adapters.lora import adapt
from fettle.models import mlp as mlp_module
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.recompute.policies import Policy

TOKENS = 40
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS = {
    "phi3": Phi3Config(**SHAPE, num_key_value_heads=4),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=16),
}


def model_of(family: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = causal_lm_class(family)(CONFIGS[family]).to(dtype)
    adapted = adapt(model, rank=3, dropout=dropout)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted.train()


def step(model, policies: list[Policy]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the adapters' gradients of two packed rows, from the same random state every time."""
    for layer, policy in zip(model.get_base_model().model.layers, policies, strict=True):
        layer.policy = policy
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (1, TOKENS))
    positions = torch.cat((torch.arange(13), torch.arange(TOKENS - 13)))[None]
    model.zero_grad()
    loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("policy", list(Policy)[1:], ids=lambda policy: policy.name)
def test_policies_agree_to_the_bit(family: str, policy: Policy) -> None:
    model = model_of(family)
    loss, gradients = step(model, [Policy.KEEP] * 3)
    for policies in ([policy] * 3, [policy, Policy.KEEP, policy]):
        other_loss, other = step(model, policies)
        assert torch.equal(loss, other_loss)
        assert gradients.keys() == other.keys() and len(gradients) > 0
        assert all(torch.equal(gradients[name], other[name]) for name in gradients)


@pytest.mark.parametrize("policy", list(Policy)[1:], ids=lambda policy: policy.name)
def test_policies_agree_in_bf16(policy: Policy) -> None:
    model = model_of("phi3", torch.bfloat16)
    loss, gradients = step(model, [Policy.KEEP] * 3)
    other_loss, other = step(model, [policy] * 3)
    torch.testing.assert_close(loss, other_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other[name], rtol=2e-2, atol=1e-2 * float(gradient.abs().max()))


def test_dropout_is_the_same_when_redone() -> None:
    """PEFT's own forward serves here; its random numbers come again."""
    model = model_of("llama", dropout=0.5)
    _, gradients = step(model, [Policy.KEEP] * 3)
    for policy in (Policy.RECOMPUTE, Policy.KEEP_ATTENTION):
        _, other = step(model, [policy] * 3)
        assert all(torch.equal(gradients[name], other[name]) for name in gradients)


def test_a_frozen_mlp_is_recomputing_without_its_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    whole: Callable[..., torch.Tensor] = mlp_module.lora_mlp

    def watch(x, mlp, *, keep, skip_output):
        calls.append(skip_output)
        return whole(x, mlp, keep=keep, skip_output=skip_output)

    monkeypatch.setattr(mlp_module, "lora_mlp", watch)
    step(model_of("phi3"), [Policy.RECOMPUTE] * 3)
    assert calls == [False] * 3 + [True] * 3


def test_the_trainers_switch_redoes_every_layer() -> None:
    model = model_of("llama").get_base_model()
    model.gradient_checkpointing_enable()
    assert {layer.policy for layer in model.model.layers} == {Policy.RECOMPUTE}
    disable = getattr(model, "activation_checkpointing_disable", None)  # its name before transformers 5.23
    (disable or model.gradient_checkpointing_disable)()
    assert {layer.policy for layer in model.model.layers} == {Policy.KEEP}
