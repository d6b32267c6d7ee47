"""Steps replayed as CUDA graphs give what the same steps give without; needs a GPU."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Phi3Config

from fettle.adapters.lora import adapt
from fettle.memory.policies import Policy
from fettle.models.decoder import DecoderForCausalLM, causal_lm_class

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
LENGTHS = ([100, 156], [256], [90, 30, 60, 60], [200])


def train(family: str, policy: Policy, *, tokens: int | None) -> list[torch.Tensor]:
    """Losses and final adapters of a few steps of two batches; tokens: of the graph, None for none."""
    torch.manual_seed(0)
    model: DecoderForCausalLM = causal_lm_class(family)(CONFIGS[family]).to("cuda", torch.bfloat16)
    adapted = adapt(model, rank=4).train()
    model.set_policies([policy] * 3)
    if tokens is not None:
        model.model.use_graphs(tokens)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    results: list[torch.Tensor] = []
    for step in range(3):
        for lengths in (LENGTHS[step], LENGTHS[step + 1]):
            generator = torch.Generator().manual_seed(sum(lengths) + step)
            ids = torch.randint(3, 61, (1, sum(lengths)), generator=generator).cuda()
            positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
            loss = adapted(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
            loss.backward()
            results.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert tokens is None or model.model.graphs.captured is not None
    return results + [p.detach().clone() for p in trained]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("policy", [Policy.KEEP, Policy.DROP, Policy.REDO], ids=lambda policy: policy.name)
def test_a_replayed_step_is_the_step(family: str, policy: Policy) -> None:
    """Rows of several lengths, padded to the graph's; gradients of two batches are summed."""
    plain, replayed = (train(family, policy, tokens=tokens) for tokens in (None, 256))
    for ours, expected in zip(replayed, plain, strict=True):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=3e-2, atol=3e-2)
