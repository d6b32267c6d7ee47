"""What the graphs read at a fixed place, padded, gives what the layers give without; on a CPU, without capturing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from fettle.adapters.lora import adapt
from fettle.models import graphs
from fettle.models.attention_context import PackedDocuments
from fettle.models.decoder import causal_lm_class

TOKENS = 64
SHARED = [
    *range(10),
    *range(4, 9),
    *range(4, 16),
]  # positions: two documents continue the first 4 tokens of the first
BATCHES = [SHARED, [*range(40)], [*SHARED, *range(20)], [*range(9), *range(7)], [*range(TOKENS)]]


class Eager(graphs._LayerGraph):
    """Computes the layers on the graph's inputs, forward and, as recomputation does, again in backward."""

    def __init__(self, *args):
        super().__init__(*args[:-1])
        self.pool = None
        self.output = self.static.output[:, : self.length]
        self.grad = self.static.grad[:, : self.length]
        self.forward = SimpleNamespace(replay=lambda: self.output.copy_(self.computed().detach()))
        self.backward = SimpleNamespace(
            replay=lambda: torch.autograd.backward(self.computed(), self.grad, inputs=self.static.trained)
        )

    def computed(self):
        bounds = torch.unique(self.documents.bounds)  # without the empty documents at the end
        documents = replace(self.documents, bounds=bounds)
        with torch.set_grad_enabled(bool(self.static.trained)):
            return self.owner.layers(self.x, PackedDocuments(self.context.rotation, documents))

    def replay(self):
        return self.computed().clone()


class EagerCaptured(Eager):
    pass


class EagerForward(Eager):
    pass


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(graphs, "_Captured", EagerCaptured)
    monkeypatch.setattr(graphs, "_Forward", EagerForward)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    adapted = adapt(causal_lm_class("llama")(config), rank=4).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return adapted


def states(model, positions, seed):
    ids = torch.randint(3, 61, (1, len(positions)), generator=torch.Generator().manual_seed(seed))
    return model.base_model.model.model(
        input_ids=ids, position_ids=torch.tensor([positions]), shares_prefixes=True, use_cache=False
    )[0]


def steps(model):
    """The result and gradients of each batch, with a pass over the next one, adapters off, before its backward."""
    found = []
    for number, positions in enumerate(BATCHES):
        model.zero_grad()
        output = states(model, positions, number)
        with torch.no_grad(), model.disable_adapter():
            other = states(model, BATCHES[number - 1], 9)
        output.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((output.detach(), other, torch.cat(gradients)))
        del output
    return found


def test_padded_inputs_of_a_graph_give_what_the_layers_give(model) -> None:
    plain = steps(model)
    own = model.base_model.model.model
    own.use_graphs(TOKENS)
    found = steps(model)
    assert len(own.graphs.captured) > 2 and own.graphs.without_gradient
    for each, expected in zip(found, plain, strict=True):
        for value, wanted in zip(each, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
