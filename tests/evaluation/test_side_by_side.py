"""Two models side by side: the figures are those that plain PyTorch computes from the checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fettle.adapters.model_ref import resolve
from fettle.checkpoints.locate import embedded_model
from fettle.data import Example, read_rows, tokenize_rows
from fettle.errors import UserError
from fettle.evaluation import scoring, side_by_side, speed
from fettle.evaluation.comparison import Comparison, Side
from fettle.evaluation.side_by_side import compare, size_bytes
from fettle.tiny.lessons import lessons

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(speed, "NEW_TOKENS", 4)
    monkeypatch.setattr(speed, "REPETITIONS", 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """12 lessons that fettle-tiny has not seen."""
    file = tmp_path_factory.mktemp("rows") / "lessons.jsonl"
    drawn = lessons(12, seed=5, split="held_out")
    file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in drawn))
    return file


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """fettle-tiny with noise on its weights: some of its answers are others."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    shutil.copytree(embedded_model(), folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in weights.items():
        weights[name] = (weight.float() + 0.02 * torch.randn(weight.shape)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def by_hand(folders, file) -> dict[str, float]:
    """KL, agreement and perplexities over the trained tokens, through stock transformers in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders]
    found = {"kl": [], "top": [], "loss_a": [], "loss_b": []}
    for example in tokenize_rows(read_rows(file), tokenizer, max_length=1024).examples:
        ids = torch.tensor([example.input_ids])
        a, b = (model(ids).logits[0].double().log_softmax(-1) for model in models)
        for n, label in enumerate(example.labels):
            if label != -100:
                found["kl"].append((a[n - 1].exp() * (a[n - 1] - b[n - 1])).sum())
                found["top"].append(torch.tensor(float(a[n - 1].argmax() == b[n - 1].argmax())))
                found["loss_a"].append(-a[n - 1, label])
                found["loss_b"].append(-b[n - 1, label])
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


def test_figures_are_those_of_plain_pytorch(noisy, rows):
    found = compare("fettle-tiny", noisy, rows, dtype="float32", device="cpu")
    expected = by_hand((embedded_model(), noisy), rows)
    assert expected["kl"] > 0.01 and expected["top"] < 1
    assert found.kl == pytest.approx(expected["kl"], rel=1e-4)
    assert found.top_agreement == pytest.approx(expected["top"])
    for side, loss in ((found.a, expected["loss_a"]), (found.b, expected["loss_b"])):
        assert side.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert found.kl_tokens == found.a.tokens == found.b.tokens
    assert found.answers == 12 and found.equal_answers < 1
    assert found.a.exact_share > found.b.exact_share
    assert found.notes == ()


def test_a_model_is_no_different_from_itself(rows):
    found = compare("fettle-tiny", "fettle-tiny", rows, samples=4, device="cpu")
    assert (found.kl, found.top_agreement, found.equal_answers) == (0, 1, 1)
    assert (found.rows, found.answers) == (4, 4)
    assert found.a.perplexity == found.b.perplexity and found.a.exact_share == found.b.exact_share


def test_the_tokens_whose_distributions_are_kept_are_spread(monkeypatch, noisy, rows):
    monkeypatch.setattr(scoring, "KL_TOKENS", 20)
    found = compare("fettle-tiny", noisy, rows, samples=6, device="cpu")
    assert 10 <= found.kl_tokens <= 20 < found.a.tokens
    assert found.kl > 0.005


def test_a_gguf_file_beside_its_checkpoint(gguf_pair, chats):
    found = compare(gguf_pair.folder, gguf_pair.file, chats, device="cpu")
    assert 0 <= found.kl < 3e-5
    assert found.a.perplexity == pytest.approx(found.b.perplexity, rel=1e-2)
    assert found.top_agreement > 0.99 and found.equal_answers > 0.9
    assert found.b.runtime == "llama.cpp" and found.b.size_bytes == gguf_pair.file.stat().st_size
    assert found.a.size_bytes > 1.5 * found.b.size_bytes


def test_a_files_size_is_known_without_opening_it_in_llama_cpp(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(60))
    assert size_bytes(resolve(tmp_path / "a.gguf", need="run")) == 64


def other_config(model, folder):
    folder = shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    return folder


def old_gguf(model, folder):
    folder.with_suffix(".gguf").write_bytes(b"GGML" + bytes(60))
    return folder.with_suffix(".gguf")


def without_tokenizer(model, folder):
    return shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_config, "the weights have 2 layers"),
        (without_tokenizer, "has no tokenizer"),
        (old_gguf, r"b\.gguf is not a GGUF file"),
    ],
)
def test_a_faulty_second_model_is_found_before_the_first_is_loaded(
    change, message, small_model, chats, tmp_path, monkeypatch
):
    monkeypatch.setattr(side_by_side, "load_ref", None)
    with pytest.raises(UserError, match=message):
        compare(small_model, change(small_model, tmp_path / "b"), chats)


def test_what_is_no_number_is_null_in_json():
    side = dict.fromkeys(("perplexity", "exact_share", "prompt_tokens_per_second"), float("nan"))
    side = Side(name="", runtime="", tokens=1, size_bytes=1, generated_tokens_per_second=1.5, **side)
    nothing = dict.fromkeys(("top_agreement", "equal_answers", "tokens_before_difference"))
    text = Comparison(rows=1, a=side, b=side, kl=float("inf"), kl_tokens=1, answers=0, **nothing).as_json()
    facts = json.loads(text, parse_constant=pytest.fail)
    assert facts["kl"] is facts["a"]["perplexity"] is None and facts["b"]["tokens"] == 1


def test_an_adapter_beside_its_base(trained, small_model, chats):
    found = compare(small_model, trained, chats, samples=8, device="cpu")
    assert found.b.perplexity < found.a.perplexity / 10
    assert found.b.size_bytes > found.a.size_bytes
    assert found.kl > 0.1


def test_different_tokenizers_leave_out_what_cannot_be_compared(gguf_pair, rows):
    found = compare("fettle-tiny", gguf_pair.file, rows, samples=4, device="cpu")
    assert found.kl is found.top_agreement is None
    assert found.answers == 4 and found.equal_answers == 0
    assert "tokenizers or chat templates differ" in found.notes[0]


def test_the_command_prints_a_table_or_json(cli, gguf_pair, chats):
    words = ("compare", gguf_pair.folder, gguf_pair.file, "--data", chats, "--samples", 3, "--device", "cpu")
    ended = cli(*words)
    assert ended.code == 0, ended.err
    for said in (
        "perplexity",
        "KL(A || B)",
        "identical answers (3 prompts)",
        "size on disk",
        "(llama.cpp)",
        "3 rows",
    ):
        assert said in ended.out
    facts = json.loads(cli(*words, "--json").out)
    assert facts["rows"] == 3 and facts["a"]["name"] == str(gguf_pair.folder)
    assert all(facts[side]["generated_tokens_per_second"] > 0 for side in "ab")


def test_the_same_ids_trained_elsewhere_are_no_twins():
    first, second = Example([1, 2, 3], [-100, 2, 3], ""), Example([1, 2, 3], [-100, -100, 3], "")
    distributions = scoring.Distributions([first, second], vocab_size=5)
    scores = scoring.Scores(top=[torch.tensor([2, 3]), torch.tensor([3])])
    assert scoring.Gap(([first], scores, distributions), [second], 5).unequal == 1
    gap = scoring.Gap(([first, second], scores, distributions), [first, second], 5)
    assert gap.unequal == 0
    gap.add(0, torch.randn(2, 5).log_softmax(-1))


def test_texts_have_no_answers(small_model, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    found = compare(small_model, small_model, tmp_path / "text.txt", device="cpu")
    assert (found.answers, found.equal_answers, found.kl) == (0, None, 0)
    assert "no answers are compared" in found.notes[0]
