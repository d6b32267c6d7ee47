"""fettle's head gives TRL's trainers what TRL's own head gives them, from padded batches that it packs."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES
from fettle.models.packing import pack_batch
from fettle.runs.head import use_own_head

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


def models(family: str, **others: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = FAMILIES[family].config(**SHAPE | others)
    written_out = {"attn_implementation": "eager"} if family == "gemma2" else {}
    stock = AutoModelForCausalLM.from_config(config, **written_out)
    ours = causal_lm_class(family)(copy.deepcopy(config))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch(is_left: bool) -> dict[str, torch.Tensor]:
    """Rows of several lengths, three of them with one prompt; one row has no label, one no prompt."""
    generator = torch.Generator().manual_seed(1)
    prompt = [7, 8, 9, 10, 11]
    answers = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in (4, 1, 7, 3, 6)]
    documents = [(prompt, answers[0]), (prompt, answers[1]), ([5], answers[3]), (prompt, answers[2])]
    documents += [([], answers[4]), ([20, 21, 22], [])]
    longest = max(len(p) + len(a) for p, a in documents)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for p, a in documents:
        pad = longest - len(p) - len(a)
        parts = {
            "input_ids": (p + a, 0),
            "attention_mask": ([1] * len(p + a), 0),
            "labels": ([-100] * len(p) + a, -100),
        }
        for name, (real, fill) in parts.items():
            rows[name].append([fill] * pad + real if is_left else real + [fill] * pad)
    return {name: torch.tensor(each) for name, each in rows.items()}


@pytest.mark.parametrize("is_left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_and_the_gradients_are_those_of_trls_head(
    family: str, temperature: float, is_left: bool
) -> None:
    stock, ours = models(family)
    add_fused_lm_head(stock, temperature=temperature, outputs=OUTPUTS)
    use_own_head(ours, temperature=temperature)
    inputs = batch(is_left)
    if is_left:  # where the stock model counts positions from the first real token
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        theirs = stock(**inputs, position_ids=position_ids, fused_lm_head=True)
    else:
        theirs = stock(**inputs, fused_lm_head=True)
    mine = ours(**inputs, fused_lm_head=True)
    for name in (*OUTPUTS, "label_mask", "loss"):
        # a row's first token is predicted from padding by the stock model, and from nothing by ours
        known = torch.ones_like(theirs.label_mask) if not is_left else inputs["attention_mask"][:, :-1].bool()
        found, expected = (getattr(each, name) for each in (mine, theirs))
        if name == "loss":
            continue
        torch.testing.assert_close(found[known].double(), expected[known].double(), rtol=1e-4, atol=1e-5)
    weights = torch.linspace(0.5, 1.5, mine.log_probs.numel()).view_as(mine.log_probs)
    weights = weights * (1 if not is_left else inputs["attention_mask"][:, :-1])
    grads = [
        dict(zip((n for n, _ in model.named_parameters()),
                 torch.autograd.grad((found.log_probs * weights).sum(), list(model.parameters())), strict=True))
        for model, found in ((ours, mine), (stock, theirs))
    ]  # fmt: skip
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=2e-3, atol=2e-5, msg=name)


def test_a_prompt_longer_than_a_window_is_not_shared() -> None:
    """Mistral's window ends within a row here: the result is still the stock model's."""
    stock, ours = models("mistral", sliding_window=6)
    add_fused_lm_head(stock, outputs=OUTPUTS)
    use_own_head(ours)
    inputs = batch(is_left=False)
    theirs, mine = (model(**inputs, fused_lm_head=True) for model in (stock, ours))
    torch.testing.assert_close(mine.log_probs, theirs.log_probs, rtol=1e-4, atol=1e-5)


def test_with_dropout_every_row_draws_for_its_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = models("llama", attention_dropout=0.1)
    use_own_head(ours)
    seen: list[int] = []
    run = ours.model.run_layers
    monkeypatch.setattr(
        ours.model, "run_layers", lambda x, context: (seen.append(x.shape[1]), run(x, context))[1]
    )
    inputs = batch(is_left=False)
    ours.train()(**inputs, fused_lm_head=True)
    ours.eval()(**inputs, fused_lm_head=True)
    assert seen == [int(inputs["attention_mask"].sum()), int(inputs["attention_mask"].sum()) - 10]


def test_a_packed_batch_has_each_prompt_once_and_knows_where_every_token_is() -> None:
    inputs = batch(is_left=True)
    packed = pack_batch(**inputs, share=True)
    assert (
        packed.input_ids.shape == packed.position_ids.shape == (1, int(inputs["attention_mask"].sum()) - 10)
    )
    real = inputs["attention_mask"].bool()
    assert torch.equal(packed.input_ids[0][packed.places[real]], inputs["input_ids"][real])
    positions = inputs["attention_mask"].cumsum(-1) - 1
    assert torch.equal(packed.position_ids[0][packed.places[real]], positions[real])
