"""Fine-tuning from Python: what is learnt, what is measured, what is left on disk."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fettle.cli.display import Display
from fettle.data import read_rows, tokenize_rows
from fettle.engine.load import load
from fettle.errors import UserError
from fettle.export.checkpoint import export_safetensors
from fettle.export.gguf.adapter import export_adapter_gguf
from fettle.methods.finetune import fixed_context, resume_training, train
from fettle.models.load import load_model, load_tokenizer
from fettle.runs.options import TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def run(model: Path, data: Path, output: Path, **options):
    settings = {"max_steps": 4, "learning_rate": 0.02, "samples": 2, "device": "cpu"} | options
    display = Display(Console(file=io.StringIO(), width=200))
    outcome = train(
        TrainOptions(model=str(model), data=str(data), output=str(output), **settings), report=display
    )
    return outcome, display.out.file.getvalue()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    file = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    row = {"prompt": "What is the capital of France?", "completion": "It is Paris."}
    file.write_text(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def outcome(small_model, chats, kept, tmp_path_factory):
    output = tmp_path_factory.mktemp("sft") / "out"
    return run(small_model, chats, output, max_steps=40, eval_steps=10, keep_data=str(kept))[0]


def test_the_loss_falls_on_what_it_learns_and_on_what_it_does_not_see(outcome):
    curve = [loss for _, loss in outcome.report.loss_curve]
    assert curve[-1] < 0.3 * curve[0]
    assert outcome.after.held_out["loss"] < 0.5 * outcome.before.held_out["loss"]
    assert outcome.after.held_out["token_accuracy"] > outcome.before.held_out["token_accuracy"]


def test_questions_are_answered_before_and_after(outcome):
    (before,), (after,) = outcome.before.answers, outcome.after.answers
    assert (before.prompt, before.expected) == (after.prompt, after.expected)
    assert before.answer != after.answer
    assert after.answer.startswith("Here is")
    assert outcome.before.exact == outcome.before.kept_exact == 0.0
    assert outcome.report.scores[0].name == "held-out exact match"
    assert {score.name for score in outcome.report.scores} >= {"old skills: exact match", "held-out loss"}


def test_the_adapters_config_is_the_same_in_every_process(outcome):
    names = json.loads((outcome.output / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 3 and names == sorted(names)


def test_the_held_out_loss_is_that_of_stock_transformers(outcome, small_model, chats):
    """The row is found by its prompt; the loss is the mean over its answer's tokens."""
    prompt = outcome.after.answers[0].prompt
    (row,) = [row for row in read_rows(chats) if row.messages[0]["content"] == prompt]
    tokenizer = AutoTokenizer.from_pretrained(outcome.output)
    (example,) = tokenize_rows([row], tokenizer, max_length=256).examples
    stock = AutoModelForCausalLM.from_pretrained(small_model)
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])

    @torch.no_grad()
    def loss(model) -> float:
        return float(model.eval()(input_ids=ids, labels=labels).loss)

    assert outcome.before.held_out["loss"] == pytest.approx(loss(stock), abs=2e-4)
    adapted = PeftModel.from_pretrained(stock, outcome.output)
    assert outcome.after.held_out["loss"] == pytest.approx(loss(adapted), abs=2e-4)


def test_the_folder_is_a_plain_adapter_that_finds_its_base(outcome, small_model):
    config = json.loads((outcome.output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(small_model)
    weights = load_file(outcome.output / "adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in weights)
    assert len(weights) == 2 * 2 * 4  # A and B, two layers, Phi-3's four matrices
    model, tokenizer = load(outcome.output, device="cpu")
    assert isinstance(model, PeftModel)
    original = AutoTokenizer.from_pretrained(small_model)
    text = "<|user|>\nSay 5.<|end|>\n<|assistant|>\n"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


def test_a_rank_stabilized_adapter_is_scaled_alike_everywhere(small_model, chats, tmp_path):
    """By stock PEFT on the stock model, merged by PEFT and by fettle, and as llama.cpp reads it (alpha / rank)."""
    output = run(small_model, chats, tmp_path / "out", rslora=True, rank=8, alpha=3)[0].output
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), output).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = stock(ids).logits
        with stock.disable_adapter():
            bare = stock(ids).logits
        merged = stock.merge_and_unload()(ids).logits
        export_safetensors(output, tmp_path / "merged")
        folders = (output, tmp_path / "merged")
        found = [load(folder, device="cpu")[0](input_ids=ids).logits for folder in folders]
    assert (bare - expected).norm() > 0.1 * expected.norm()
    for logits in (merged, *found):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    file = export_adapter_gguf(output, tmp_path / "adapter.gguf")
    alpha = GGUFReader(file).get_field("adapter.lora.alpha").contents()
    assert alpha / 8 == pytest.approx(3 / math.sqrt(8))


def test_nothing_of_the_base_is_changed(outcome, small_model):
    assert not (outcome.output / "model.safetensors").exists()
    model, _ = load(outcome.output, device="cpu")
    base = load_file(small_model / "model.safetensors")
    for name, weight in model.unload().state_dict().items():
        assert torch.equal(weight, base[name])


def test_the_report_stands_alone(outcome):
    page = (outcome.output / "report.html").read_text()
    assert "Say " in page and "held-out loss" in page and str(outcome.output) in page
    assert "<script" not in page


def test_without_packing_the_rows_teach_the_same(small_model, chats, tmp_path):
    """Packed or not, a row sees only itself: with all rows in one step both give one and the same gradient."""
    settings = {"max_steps": 1, "batch_size": 24, "eval_fraction": 0.0, "warmup_ratio": 0.0}
    packed, _ = run(small_model, chats, tmp_path / "packed", **settings)
    single, _ = run(small_model, chats, tmp_path / "single", packing=False, **settings)
    first, second = (x.report.loss_curve[0][1] for x in (packed, single))
    assert first == pytest.approx(second, abs=1e-4)


def test_gradient_checkpointing_does_not_change_the_run(small_model, chats, tmp_path):
    for name, is_on in (("on", True), ("off", False)):
        run(small_model, chats, tmp_path / name, gradient_checkpointing=is_on, dropout=0.1)
    on, off = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("on", "off"))
    assert all(torch.allclose(on[name], off[name], atol=1e-6) for name in on)


def test_only_the_layers_asked_for_are_adapted(small_model, chats, tmp_path):
    run(small_model, chats, tmp_path / "out", target_modules=["qkv_proj"], rank=3, alpha=6.0, max_steps=1)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"qkv_proj"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)


def test_bf16_weights_stay_bf16_and_the_adapter_learns_in_fp32(small_model, chats, tmp_path):
    outcome, _ = run(small_model, chats, tmp_path / "out", dtype="bfloat16", max_steps=20)
    curve = [loss for _, loss in outcome.report.loss_curve]
    assert curve[-1] < 0.5 * curve[0]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.float32"}


def test_a_model_without_a_template_learns_chats_with_one(small_model, chats, tmp_path):
    """The template it was taught with is saved beside the adapter, or nobody could ask it anything."""
    plain = Path(shutil.copytree(small_model, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    run(plain, chats, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(plain).chat_template is None
    assert "<|assistant|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_plain_text_is_measured_by_its_loss_alone(small_model, tmp_path):
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    outcome, shown = run(small_model, tmp_path / "book.txt", tmp_path / "out", max_length=32, max_steps=10)
    assert "split into windows of 32 tokens" in shown
    assert outcome.before.exact is None and outcome.before.answers == []
    assert math.isfinite(outcome.after.held_out["loss"])


def test_too_few_rows_to_hold_any_out(small_model, tmp_path):
    row = {"prompt": "Say 1.", "completion": "Here is 1!"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    outcome, shown = run(small_model, tmp_path / "rows.jsonl", tmp_path / "out", max_steps=1)
    assert "too few" in shown
    assert outcome.before.held_out == outcome.after.held_out == {}
    assert (outcome.output / "report.html").exists()


def test_held_out_rows_of_ones_own(small_model, chats, kept, tmp_path):
    outcome, shown = run(small_model, chats, tmp_path / "out", eval_data=str(kept), max_steps=1)
    assert "24 rows" in shown
    assert [answer.prompt for answer in outcome.after.answers] == ["What is the capital of France?"]


def test_metrics_reach_the_tracker_that_was_asked_for(small_model, chats, tmp_path, monkeypatch):
    """Through transformers' own callback, which a recording one replaces here."""
    seen = {}

    class Recording(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if args.run_name == "no login":
                raise KeyError("use `trackio login`")

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.setdefault(args.run_name, []).append(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Recording)
    monkeypatch.setattr("fettle.runs.defaults.find_spec", lambda name: name == "trackio")
    run(small_model, chats, tmp_path / "without")
    assert not seen
    run(small_model, chats, tmp_path / "with one", report_to="trackio", eval_steps=2)
    (logs,) = seen.values()
    assert list(seen) == ["with one"]
    assert sum("loss" in each for each in logs) == 4 and sum("eval_loss" in each for each in logs) == 2
    with pytest.raises(
        UserError, match=r"^report_to trackio cannot start: KeyError: 'use `trackio login`'\.$"
    ):
        run(small_model, chats, tmp_path / "no login", report_to="trackio")


def test_a_finished_run_is_not_done_again(outcome):
    assert resume_training(outcome.output) is None


def test_longrope_is_fixed_for_rows_that_may_pass_the_original_context(small_model, tmp_path):
    folder = Path(shutil.copytree(small_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    config |= {"original_max_position_embeddings": 64, "rope_parameters": longrope | factors}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    assert fixed_context(model, 64) is None
    assert fixed_context(model, 65) == 65
    assert fixed_context(load_model(small_model), 256) is None
    assert load_tokenizer(folder).chat_template
