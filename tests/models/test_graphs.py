"""Steps replayed as CUDA graphs give what the same steps give without; needs a GPU."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config

from fettle.adapters.lora import adapt
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class
from fettle.recompute.policies import Policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS = {
    "phi3": Phi3Config(**SHAPE, num_key_value_heads=4),
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=32, sliding_window=64),
}
LENGTHS = ([[100, 156]], [[256]], [[90, 30], [60, 60]], [[200]])


def train(family: str, policy: Policy, *, tokens: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and what a few steps of two batches change; tokens: of the graph, None for none."""
    torch.manual_seed(0)
    model: DecoderForCausalLM = causal_lm_class(family)(CONFIGS[family]).to("cuda", torch.bfloat16)
    adapted = adapt(model, rank=4).train()
    model.set_policies([policy] * 3)
    if tokens is not None:
        model.model.use_graphs(tokens)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in trained])
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for step in range(3):
        losses += [backward(adapted, LENGTHS[index], seed=index) for index in (step, step + 1)]
        optimizer.step()
        optimizer.zero_grad()
    assert tokens is None or model.model.graphs.captured
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in trained]) - before


def backward(model: torch.nn.Module, rows: list[list[int]], *, seed: int) -> torch.Tensor:
    """rows: the lengths of the documents of each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (len(rows), sum(rows[0])), generator=generator).cuda()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]).cuda()
    loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "policy", [Policy.KEEP, Policy.RECOMPUTE_NORMS, Policy.RECOMPUTE], ids=lambda policy: policy.name
)
def test_a_replayed_step_is_the_step(family: str, policy: Policy) -> None:
    """Rows of several lengths, padded to the graph's; batches of one row and two; gradients of batches are summed."""
    plain, replayed = (train(family, policy, tokens=tokens) for tokens in (None, 256))
    torch.testing.assert_close(replayed[0], plain[0], rtol=2e-3, atol=2e-3)
    assert (replayed[1] - plain[1]).norm() < 0.05 * plain[1].norm()


def test_gradients_may_be_cleared_between_forward_and_backward() -> None:
    plain, replayed = (gradients_of_two(tokens, clear=True) for tokens in (None, 256))
    assert (replayed - plain).norm() < 0.02 * plain.norm()


def test_a_second_forward_pass_leaves_what_the_first_one_kept() -> None:
    plain, replayed = (gradients_of_two(tokens, clear=False) for tokens in (None, 256))
    assert (replayed - plain).norm() < 0.02 * plain.norm()


def test_a_pass_without_gradient_follows_the_adapters_state() -> None:
    """As a preference method makes it: between a forward and a backward pass, the adapters switched off."""
    torch.manual_seed(0)
    model: DecoderForCausalLM = causal_lm_class("llama")(CONFIGS["llama"]).to("cuda", torch.bfloat16)
    adapted = adapt(model, rank=4).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    generator = torch.Generator().manual_seed(0)
    every = [torch.randint(3, 61, (1, 256), generator=generator).cuda() for _ in range(4)]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return adapted(input_ids=ids, use_cache=False).logits

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with adapted.disable_adapter():
            without = logits(ids)
        return logits(ids), without

    plain = [both(ids) for ids in every]
    model.model.use_graphs(256)
    for ids, expected in zip(every, plain, strict=True):
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        for found, each in zip(both(ids), expected, strict=True):
            torch.testing.assert_close(found, each, rtol=2e-2, atol=2e-2)
        loss.backward()
        del loss  # no graph can be recorded while an older loss is alive
    assert len(model.model.graphs.without_gradient) == 2
    assert (plain[0][0] - plain[0][1]).abs().max() > 0.1


def gradients_of_two(tokens: int | None, *, clear: bool) -> torch.Tensor:
    """The adapters' gradients of one batch, or of the sum of two that go forward before either goes back."""
    torch.manual_seed(0)
    model: DecoderForCausalLM = causal_lm_class("llama")(CONFIGS["llama"]).to("cuda", torch.bfloat16)
    adapted = adapt(model, rank=4).train()
    if tokens is not None:
        model.model.use_graphs(tokens)
        backward(adapted, [[256]], seed=9)  # the first fitting batch runs beside the graph
        adapted.zero_grad()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, 61, (1, 256), generator=generator).cuda() for _ in range(2))
    loss = adapted(input_ids=first, labels=first, use_cache=False).loss
    if clear:
        adapted.zero_grad()
    else:
        loss = loss + adapted(input_ids=second, labels=second, use_cache=False).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])
