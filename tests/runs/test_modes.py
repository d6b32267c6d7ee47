"""Every module of the model is in training mode in every training step, and in evaluation mode in every evaluation.

One flag does not speak for the whole tree: PEFT's wrapper says "training" over a base that is still in evaluation
mode, in which recompute policies, CUDA graphs and dropout are off.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import SFTTrainer

from fettle.adapters.lora import adapt, attach
from fettle.methods.finetune import resume_training, train
from fettle.methods.pretrain import pretrain, resume_pretraining
from fettle.models.load import load_model
from fettle.models.modes import evaluating
from fettle.runs.options import PretrainOptions, TrainOptions
from fettle.runs.single_process import without_module_walks

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture
def passes(monkeypatch) -> list[tuple[bool, set[bool]]]:
    """(whether a gradient is wanted, the modes of all modules) of each forward pass that a trainer makes."""
    seen: list[tuple[bool, set[bool]]] = []
    compute_loss = SFTTrainer.compute_loss

    def note(trainer, model, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), {module.training for module in model.modules()}))
        return compute_loss(trainer, model, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", note)
    return seen


def require_right_modes(passes: list[tuple[bool, set[bool]]], *, evaluates: bool) -> None:
    assert {wanted for wanted, _ in passes} == ({True, False} if evaluates else {True})
    assert all(modes == {wanted} for wanted, modes in passes)


def train_options(small_model, chats, output, **changes) -> TrainOptions:
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "samples": 1, "device": "cpu"} | changes
    return TrainOptions(model=str(small_model), data=str(chats), output=str(output), **options)


@pytest.mark.parametrize("eval_fraction", [0.0, 0.2])
def test_in_training(small_model, chats, tmp_path, passes, eval_fraction):
    options = train_options(small_model, chats, tmp_path / "out", eval_fraction=eval_fraction)
    train(options)
    require_right_modes(passes, evaluates=eval_fraction > 0)


@pytest.mark.parametrize("eval_fraction", [0.0, 0.2])
def test_after_a_resume(small_model, chats, tmp_path, passes, killed_at_save, eval_fraction):
    options = train_options(small_model, chats, tmp_path / "out", eval_fraction=eval_fraction)
    with killed_at_save(2):
        train(options)
    passes.clear()
    resume_training(tmp_path / "out")
    require_right_modes(passes, evaluates=eval_fraction > 0)


def test_in_pretraining_and_after_its_resume(chats, tmp_path, passes, killed_at_save):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4}
    loop = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "samples": 1, "device": "cpu"}
    options = PretrainOptions(
        data=str(chats), output=str(tmp_path / "out"), eval_fraction=0.2, **sizes, **loop
    )
    with killed_at_save(2):
        pretrain(options)
    require_right_modes(passes, evaluates=True)
    passes.clear()
    resume_pretraining(tmp_path / "out")
    require_right_modes(passes, evaluates=True)


def test_an_adapted_model_is_in_one_mode(small_model, tmp_path):
    adapted = adapt(load_model(small_model))
    assert {module.training for module in adapted.modules()} == {True}
    adapted.save_pretrained(tmp_path / "adapter")
    for is_trainable in (True, False):
        attached = attach(load_model(small_model), tmp_path / "adapter", is_trainable=is_trainable)
        assert {module.training for module in attached.modules()} == {is_trainable}


def test_the_shortcut_of_a_step_reaches_what_the_wrapper_hides(small_model):
    """Stock PEFT's wrapper over a base in evaluation mode, and a part that someone has switched meanwhile."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapted = get_peft_model(load_model(small_model), config)
    assert {module.training for module in adapted.modules()} == {True, False}
    with without_module_walks(adapted, []):
        adapted.train()
        assert {module.training for module in adapted.modules()} == {True}
        adapted.get_base_model().model.layers[0].eval()
        adapted.train()
        assert {module.training for module in adapted.modules()} == {True}


def test_an_evaluation_leaves_each_module_as_it_was(small_model):
    model = load_model(small_model).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert {module.training for module in model.modules()} == {False}
    assert [module.training for module in model.modules()] == before
