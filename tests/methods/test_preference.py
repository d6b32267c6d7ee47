"""Preference training takes the steps that TRL's trainers take on the stock model: losses, rewards, adapters.

TRL gets the same tokens and seed and pads its batches; fettle's model computes each prompt once, without padding.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from fettle.adapters.lora import adapt
from fettle.data import LabelledExample, PreferenceExample
from fettle.methods import kto, preference
from fettle.methods.finetune import METHODS
from fettle.methods.reference_free import orpo_loss
from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES
from fettle.recompute.policies import Policy
from fettle.runs.method_facts import METHOD_FACTS
from fettle.runs.options import TrainOptions
from fettle.runs.trainer import training_arguments

SHAPE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
STEPS = 10


def answers(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 9, (1,), generator=generator))
    return [*torch.randint(3, 60, (count,), generator=generator).tolist(), 2]


def pairs() -> list[PreferenceExample]:
    """Prompts of 1 to 24 tokens, one of which occurs twice; answers of 2 to 10."""
    prompts = [[3 + n % 50 for n in range(7 * i, 7 * i + 1 + 4 * (i % 7))] for i in range(19)]
    prompts.append(prompts[5])
    made = []
    for number, prompt in enumerate(prompts):
        chosen, rejected = answers(number), answers(100 + number)
        made.append(PreferenceExample(prompt, chosen, rejected, f"row {number}", chosen, rejected))
    return made


def labelled() -> list[LabelledExample]:
    return [
        LabelledExample(pair.prompt_ids, ids, is_good, pair.where, ids)
        for pair in pairs()[:10]
        for ids, is_good in ((pair.chosen_ids, True), (pair.rejected_ids, False))
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def bases(family: str) -> tuple[Any, Any]:
    """The stock model and ours, with the same weights and the same new adapter, whose B is zero."""
    torch.manual_seed(0)
    config = FAMILIES[family].config(**SHAPE)
    written_out = {"attn_implementation": "eager"} if family == "gemma2" else {}
    stock = AutoModelForCausalLM.from_config(config, **written_out)
    ours = causal_lm_class(family)(copy.deepcopy(config))
    ours.load_state_dict(stock.state_dict())
    lora = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(stock, lora), adapt(ours, rank=4)
    for model in adapted:
        generator = torch.Generator().manual_seed(3)
        for name, parameter in sorted(model.named_parameters()):  # Phi-3 defines them in another order
            if "lora_A" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def arguments(options: TrainOptions, folder: Path) -> dict[str, Any]:
    found = training_arguments(options, folder, has_held_out=False, recomputes=False)
    return found | {"logging_steps": 1, "save_strategy": "no"}


def options_of(method: str, **others: Any) -> TrainOptions:
    return TrainOptions(
        model="", data="", output="", method=method, max_steps=STEPS, learning_rate=1e-2, device="cpu",
        save_steps=STEPS, **{"batch_size": 4, "gradient_accumulation_steps": 1} | others,
    )  # type: ignore[arg-type]  # fmt: skip


def trained(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train; return the log of each step, without times, and the adapter."""
    trainer.train()
    ignored = ("runtime", "second", "time", "epoch", "num_tokens", "num_input_tokens_seen", "total_flos")
    log = [
        {name: value for name, value in entry.items() if not any(each in name for each in ignored)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return log, get_peft_model_state_dict(trainer.model)


def assert_same_steps(found: Any, expected: Any) -> None:
    logs, adapters = zip(found, expected, strict=True)
    assert len(logs[0]) == len(logs[1]) == STEPS
    for mine, theirs in zip(*logs, strict=True):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    assert len({entry["loss"] for entry in logs[1]}) == STEPS
    for name, weight in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], weight, rtol=2e-3, atol=2e-5)


class Prepared(DPOTrainer):
    """TRL's trainer with the tokens and the batches of ours."""

    columns = preference.PairTrainer.columns
    _get_train_sampler = preference.ComparingTrainer._get_train_sampler

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class PreparedKTO(KTOTrainer):
    columns = kto.LabelledTrainer.columns
    _get_train_sampler = preference.ComparingTrainer._get_train_sampler

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def assert_dpo_is_trls(family: str, losses: list[str], tokenizer: Any, folder: Path, **others: Any) -> None:
    stock, ours = bases(family)
    options = options_of("dpo", loss=losses, label_smoothing=0.1, **others)
    rows = preference.PAIRS.dataset(pairs())
    weights = {name: float(weight) for name, _, weight in (each.partition("=") for each in losses)}
    config = DPOConfig(
        **arguments(options, folder / "stock"), beta=0.1, label_smoothing=0.1, max_length=None,
        loss_type=list(weights), loss_weights=list(weights.values()), remove_unused_columns=False,
    )  # fmt: skip
    theirs = Prepared(args=config, model=stock, train_dataset=rows, processing_class=tokenizer)
    parts = {"model": ours, "train_dataset": rows, "processing_class": tokenizer}
    mine = METHODS["dpo"]().trainer(options, arguments(options, folder / "ours"), **parts)
    assert_same_steps(trained(mine), trained(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_is_trls_for_every_family(family: str, tokenizer: Any, tmp_path: Path) -> None:
    assert_dpo_is_trls(family, ["sigmoid=1"], tokenizer, tmp_path)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_every_loss_variant_is_trls(part: int, tokenizer: Any, tmp_path: Path) -> None:
    losses = [f"{name}={weight}" for weight, name in enumerate(METHOD_FACTS["dpo"].losses[part::3], start=1)]
    assert_dpo_is_trls("llama", losses, tokenizer, tmp_path)


def test_accumulated_batches_are_trls(tokenizer: Any, tmp_path: Path) -> None:
    accumulated = {"batch_size": 2, "gradient_accumulation_steps": 2}
    assert_dpo_is_trls("phi3", ["sigmoid=1"], tokenizer, tmp_path, **accumulated)


@pytest.mark.parametrize("loss", METHOD_FACTS["kto"].losses)
def test_kto_is_trls(loss: str, tokenizer: Any, tmp_path: Path) -> None:
    stock, ours = bases("llama")
    options = options_of("kto", loss=[loss])
    rows = kto.dataset_of(labelled())
    collate = kto.label_collator(tokenizer, None)
    config = KTOConfig(
        **arguments(options, tmp_path / "stock"), beta=0.1, loss_type=loss, max_length=None,
        remove_unused_columns=False,
    )  # fmt: skip
    theirs = PreparedKTO(
        args=config, model=stock, train_dataset=rows, processing_class=tokenizer, data_collator=collate
    )
    parts = {"model": ours, "train_dataset": rows, "processing_class": tokenizer}
    mine = METHODS["kto"]().trainer(options, arguments(options, tmp_path / "ours"), **parts)
    assert_same_steps(trained(mine), trained(theirs))


def test_the_mismatched_answers_of_kto_are_from_the_batch_and_to_other_prompts(tokenizer: Any) -> None:
    rows = list(kto.dataset_of(labelled()).select(range(6)))  # good and bad answers to three prompts
    batch = kto.label_collator(tokenizer, 12)(rows)
    answers = [row["completion_ids"] for row in rows]
    for number, row in enumerate(rows):
        ids = batch["KL_input_ids"][number][batch["KL_attention_mask"][number].bool()].tolist()
        taken = [
            a for n, a in enumerate(answers) if (row["prompt_ids"] + a)[:12] == ids and n // 2 != number // 2
        ]
        assert taken and len(ids) <= 12
    assert batch["KL_completion_mask"].sum() > 0
    one = kto.label_collator(tokenizer, None)(rows[:1])
    assert torch.equal(one["KL_input_ids"], one["input_ids"])  # there is no other prompt


def test_orpo_has_a_gradient_at_certain_answers() -> None:
    chosen = torch.tensor([0.0, -1e-9, -0.6931, -5.0], requires_grad=True)
    (grad,) = torch.autograd.grad(orpo_loss(chosen, torch.full((4,), -2.0), 0.1).sum(), chosen)
    assert grad.isfinite().all()


def mean_log_prob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(answer)[:, None]).mean()


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_reference_free_losses_are_their_papers_formulas(method: str, tokenizer: Any, tmp_path: Path) -> None:
    stock, ours = bases("llama")
    options = options_of(method, beta=0.7, **({} if method == "orpo" else {"margin": 0.3}))
    parts = {"model": ours, "train_dataset": preference.PAIRS.dataset(pairs()), "processing_class": tokenizer}
    trainer = METHODS[method]().trainer(options, arguments(options, tmp_path), **parts)
    rows = [trainer.train_dataset[n] for n in range(4)]
    found = trainer.compute_loss(ours, trainer.data_collator(rows))
    losses = []
    for pair in pairs()[:4]:
        chosen, rejected = (
            mean_log_prob(stock, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        if method == "orpo":
            odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
            losses.append(-chosen - 0.7 * F.logsigmoid(torch.log(odds[0] / odds[1])))
        else:
            losses.append(-F.logsigmoid(0.7 * (chosen - rejected) - 0.3))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
             for loss, model in ((found, ours), (expected, stock))]  # fmt: skip
    named = [dict(zip([n for n, p in model.named_parameters() if p.requires_grad], grad, strict=True))
             for model, grad in zip((ours, stock), grads, strict=True)]  # fmt: skip
    for name, grad in named[1].items():
        torch.testing.assert_close(named[0][name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "policy", [each for each in Policy if not each.is_offloaded], ids=lambda each: each.name
)
def test_every_recompute_policy_gives_the_same_gradients(
    policy: Policy, tokenizer: Any, tmp_path: Path
) -> None:
    found = []
    for chosen in (Policy.KEEP, policy):
        _, ours = bases("phi3")
        ours.get_base_model().set_policies([chosen] * 2)
        options = options_of("dpo")
        parts = {
            "model": ours,
            "train_dataset": preference.PAIRS.dataset(pairs()),
            "processing_class": tokenizer,
        }
        trainer = METHODS["dpo"]().trainer(options, arguments(options, tmp_path), **parts)
        ours.train()
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
        loss = trainer.compute_loss(ours, batch)
        found.append(torch.autograd.grad(loss, [p for p in ours.parameters() if p.requires_grad]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_batch_computes_each_prompt_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = bases("llama")
    decoder, seen = ours.get_base_model().model, []
    run = decoder.run_layers
    monkeypatch.setattr(
        decoder, "run_layers", lambda x, context: (seen.append(x.shape[1]), run(x, context))[1]
    )
    options = options_of("dpo", batch_size=3)
    parts = {"model": ours, "train_dataset": preference.PAIRS.dataset(pairs()), "processing_class": tokenizer}
    trainer = METHODS["dpo"]().trainer(options, arguments(options, tmp_path), **parts)
    rows = pairs()[3:6]
    trainer.compute_loss(ours, trainer.data_collator([trainer.train_dataset[n] for n in range(3, 6)]))
    tokens = sum(len(each.prompt_ids) + len(each.chosen_ids) + len(each.rejected_ids) for each in rows)
    assert seen == [tokens, tokens]  # the policy's pass and the reference's
