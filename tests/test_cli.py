"""The command line, from training to a folder that others open; stock transformers and PEFT are the oracle."""

import contextlib
import errno
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fettle
from fettle.export import job as export_job

PROMPT = "What is the capital of France?"
TOKENS = 12

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture(scope="module")
def plain_model(small_model, tmp_path_factory):
    """The same checkpoint without a chat template."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(small_model, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def stock_answer(folder: Path, prompt: str, *, is_raw: bool = False, model=None, turns=(), **options) -> str:
    """What stock transformers says to a prompt, greedily unless told otherwise."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if is_raw:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        messages = [*turns, {"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    model = model or AutoModelForCausalLM.from_pretrained(folder).eval()
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": stops, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def generate(cli, folder, *more, prompt=PROMPT, stdin="") -> str:
    """The completion, having checked that nothing else was printed."""
    ended = cli(
        *("generate", "--model", folder, "--prompt", prompt, "--max-new-tokens", TOKENS, *more), stdin=stdin
    )
    assert (ended.code, ended.err) == (0, "")
    return ended.out


# --- generate ----------------------------------------------------------------------------------------------


def test_generate_prints_what_stock_transformers_says(cli, small_model):
    answer = stock_answer(small_model, PROMPT)
    assert len(answer) > 5
    assert generate(cli, small_model) == answer + "\n"


def test_generate_raw_continues_the_prompt_as_it_is(cli, small_model):
    answer = stock_answer(small_model, PROMPT, is_raw=True)
    assert answer != stock_answer(small_model, PROMPT)
    assert generate(cli, small_model, "--raw") == answer + "\n"


def test_a_checkpoint_without_a_template_is_continued(cli, plain_model):
    assert generate(cli, plain_model) == stock_answer(plain_model, PROMPT, is_raw=True) + "\n"


def test_the_prompt_can_come_from_standard_input(cli, small_model):
    assert generate(cli, small_model, prompt="-", stdin=PROMPT + "\n") == generate(cli, small_model)
    assert generate(cli, small_model, prompt="-", stdin=PROMPT + "\n\n") != generate(cli, small_model)


def test_a_system_turn_goes_before_the_prompt(cli, small_model):
    system = [{"role": "system", "content": "Be brief."}]
    answer = stock_answer(small_model, PROMPT, turns=system)
    assert answer != stock_answer(small_model, PROMPT)
    assert generate(cli, small_model, "--system", "Be brief.") == answer + "\n"


def test_sampling_is_repeated_by_its_seed(cli, small_model):
    drawn = [generate(cli, small_model, "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != generate(cli, small_model)


def test_a_tiny_share_of_the_likeliest_tokens_is_the_likeliest_token(cli, small_model):
    options = ("--temperature", 1.5, "--seed", 1)
    assert generate(cli, small_model, *options, "--top-p", 1e-9) == generate(cli, small_model)


def test_weights_can_be_held_in_another_type(cli, small_model):
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16).eval()
    answer = stock_answer(small_model, PROMPT, model=model)
    assert generate(cli, small_model, "--dtype", "bfloat16") == answer + "\n"


def test_without_a_limit_the_answer_ends_where_the_context_does(cli, small_model):
    ended = cli("generate", "--model", small_model, "--prompt", PROMPT)  # context: 256 tokens
    assert ended.code == 0
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    room = 256 - len(prompt["input_ids"])
    assert ended.out == stock_answer(small_model, PROMPT, max_new_tokens=room) + "\n"


def test_the_real_command_prints_the_completion_and_nothing_else(cli, trained):
    """In a process of its own, where whatever the libraries print on import or from a thread would show."""
    words = ["generate", "--model", str(trained), "--prompt", PROMPT, "--max-new-tokens", str(TOKENS)]
    done = subprocess.run(
        [sys.executable, "-m", "fettle", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == cli(*words).out != ""


# --- chat --------------------------------------------------------------------------------------------------


def chat(cli, folder, *lines: str, options=()):
    words = ("chat", "--model", folder, "--temperature", 0, "--max-new-tokens", TOKENS, *options)
    return cli(*words, stdin="".join(line + "\n" for line in lines))


def test_chat_answers_each_line_and_remembers_the_last(cli, small_model):
    second = "And of Spain?"
    first_answer = stock_answer(small_model, PROMPT)
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": first_answer}]
    second_answer = stock_answer(small_model, second, turns=turns)
    assert second_answer != stock_answer(small_model, second)
    ended = chat(cli, small_model, PROMPT, "", second)
    assert ended.code == 0
    assert ended.out == f"{first_answer}\n{second_answer}\n"
    assert "/exit" in ended.err  # how to leave is said, but not where the answers go


def test_chat_starts_over_and_leaves_when_told(cli, small_model):
    answer = stock_answer(small_model, PROMPT)
    ended = chat(cli, small_model, PROMPT, "/new", PROMPT, "/exit", PROMPT)
    assert (ended.code, ended.out) == (0, f"{answer}\n{answer}\n")


def test_chat_keeps_the_system_turn(cli, small_model):
    answer = stock_answer(small_model, PROMPT, turns=[{"role": "system", "content": "Be brief."}])
    ended = chat(cli, small_model, PROMPT, "/new", PROMPT, options=("--system", "Be brief."))
    assert ended.out == f"{answer}\n{answer}\n"


# --- train -------------------------------------------------------------------------------------------------


def test_train_leaves_an_adapter_that_learnt_and_a_report(cli, trained, small_model, chats):
    assert generate(cli, trained, prompt="Say 5.") != generate(cli, small_model, prompt="Say 5.")
    assert {path.name for path in trained.iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"),
        *("run.yaml", "report.html", "tensorboard", "checkpoints"),
    }
    assert not list(trained.rglob(".*")), "temporary files are left"
    options = yaml.safe_load((trained / "run.yaml").read_text())
    assert options["model"] == str(small_model) and options["data"] == str(chats)
    unresolved = {name for name, value in options.items() if value is None}
    by_plan = {"gradient_checkpointing", "quantization", "memory"}
    assert unresolved == by_plan | {
        "eval_data",
        "keep_data",
        *("early_stopping", "report_to"),
        "alpha",
        *("beta", "loss", "label_smoothing", "margin"),
        "chat_template",
        "target_modules",
    }  # None means something there


def test_train_says_what_it_understood_and_what_to_type_next(cli, small_model, chats, tmp_path):
    output = tmp_path / "out"
    ended = cli("train", "--model", small_model, "--data", chats, "--output", output, "--max-steps", 2)
    assert ended.code == 0
    assert "23 rows (23 messages) became 23 examples" in ended.out
    assert "⟦Here is 0!<|end|>⟧" in ended.out
    assert "held-out loss" in ended.out
    for line in ended.out.splitlines():
        if line.startswith("  fettle generate"):
            break
    else:
        pytest.fail("what to type next is not said")
    assert f"fettle export --model {output} --format safetensors --to {output}-merged" in ended.out


def test_options_on_the_line_win_over_the_file(cli, small_model, chats, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {small_model}\ndata: {chats}\nmax_steps: 1\nrank: 4\nlearning-rate: 3e-3\n")
    output = tmp_path / "out"
    assert cli("train", "--config", config, "--output", output, "--rank", 2, "--no-packing").code == 0
    ran = yaml.safe_load((output / "run.yaml").read_text())
    assert (ran["rank"], ran["max_steps"], ran["learning_rate"], ran["packing"]) == (2, 1, 3e-3, False)
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2


def test_the_written_options_repeat_the_run_bit_for_bit(cli, trained, tmp_path):
    again = cli("train", "--config", trained / "run.yaml", "--output", tmp_path / "again")
    assert again.code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_another_seed_is_another_run(cli, trained, tmp_path):
    again = cli(
        *("train", "--config", trained / "run.yaml", "--output", tmp_path / "again"),
        *("--seed", 1, "--max-steps", 1, "--samples", 0),
    )
    assert again.code == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() != (trained / name).read_bytes()


def test_a_finished_run_has_nothing_to_resume(cli, trained):
    before = (trained / "adapter_model.safetensors").stat().st_mtime_ns
    ended = cli("train", "--resume", "--output", trained)
    assert ended.code == 0
    assert "has already finished" in ended.out
    assert (trained / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_the_model_can_be_trained_where_it_stands(cli, small_model, chats, tmp_path, monkeypatch):
    """A relative path in --model must still be found when the adapter is used from elsewhere."""
    monkeypatch.chdir(small_model.parent)
    words = ("train", "--model", small_model.name, "--data", chats, "--output", tmp_path / "out")
    assert cli(*words, "--max-steps", 1, "--samples", 0).code == 0
    monkeypatch.chdir(tmp_path)
    assert generate(cli, "out")


# --- what others open --------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    ids = tokenizer("Say 5. Here is 5! The quick brown fox", return_tensors="pt")["input_ids"]
    return model.eval()(input_ids=ids, use_cache=False).logits


def test_the_adapter_opens_in_stock_peft_on_a_stock_model(cli, trained, small_model):
    base = AutoModelForCausalLM.from_pretrained(small_model)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    bare = logits(base, tokenizer)
    stock = logits(PeftModel.from_pretrained(base, trained), tokenizer)
    ours = logits(fettle.load(trained)[0], tokenizer)
    assert (ours - stock).abs().max() < 1e-5
    assert (ours - bare).abs().max() > 0.1


def test_the_exported_model_opens_in_stock_transformers(cli, trained, small_model, tmp_path):
    merged = tmp_path / "merged"
    ended = cli("export", "--model", trained, "--format", "safetensors", "--to", merged)
    assert (ended.code, ended.out, ended.err) == (0, f"{merged}\n", "")
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    adapted, own_tokenizer = fettle.load(trained)
    assert type(stock).__name__ == "Phi3ForCausalLM"
    assert (logits(stock, tokenizer) - logits(adapted, own_tokenizer)).abs().max() < 1e-4
    assert {name: t.shape for name, t in load_file(merged / "model.safetensors").items()} == {
        name: t.shape for name, t in load_file(small_model / "model.safetensors").items()
    }
    messages = [{"role": "user", "content": PROMPT}]
    original = AutoTokenizer.from_pretrained(small_model)
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert generate(cli, merged) == generate(cli, trained) == stock_answer(merged, PROMPT) + "\n"


def test_a_full_model_is_exported_in_another_type(cli, small_model, tmp_path):
    words = ("export", "--model", small_model, "--to", tmp_path / "half", "--dtype", "bfloat16")
    assert cli(*words).code == 0
    stored = load_file(tmp_path / "half" / "model.safetensors")
    original = load_file(small_model / "model.safetensors")
    assert all(torch.equal(stored[name], original[name].bfloat16()) for name in original)


# --- the Python names --------------------------------------------------------------------------------------


def test_every_public_name_is_there():
    assert all(getattr(fettle, name) is not None for name in fettle.__all__)
    assert sorted(fettle.__all__) == list(fettle.__all__) == sorted(fettle._HOME)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fettle.nonsense  # noqa: B018


def test_help_and_import_answer_without_loading_torch():
    code = (
        "import sys, fettle, fettle.cli\n"
        "try: fettle.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--learning-rate" in done.stdout
    assert done.stdout.rstrip().endswith("heavy: []")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some space there"),
        (
            OSError(errno.EFBIG, "File too large", "/there/file"),
            "/there/file: File too large: raise the file size limit",
        ),
        (
            RuntimeError("serializing: I/O error: File too large (os error 27)"),
            "File too large: raise the file size limit",
        ),
        (MemoryError(), "Cannot allocate memory: close other programs"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "Cannot allocate memory",
        ),
    ],
)
def test_what_the_system_has_no_more_of_is_one_sentence(cli, monkeypatch, error, said):
    monkeypatch.setattr(export_job, "export", Mock(side_effect=error))
    ended = cli("export", "--model", "a/b", "--to", "there")
    assert ended.code == 2 and ended.err.count("\n") == 1 and said in ended.err


def test_a_fault_of_our_own_is_not_hidden(cli, monkeypatch):
    monkeypatch.setattr(export_job, "export", Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        cli("export", "--model", "a/b", "--to", "there")


def test_a_name_that_leaves_no_room_for_a_temporary_one(cli, small_model, tmp_path):
    ended = cli("export", "--model", small_model, "--to", tmp_path / ("x" * 245))
    assert ended.code == 2 and "File name too long: choose a shorter name" in ended.err


@contextlib.contextmanager
def file_size_limit(size: int):
    """As on a full disk, every file ends at `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_disk_that_takes_no_more_leaves_nothing(cli, small_model, tmp_path, form):
    with file_size_limit(9999):
        ended = cli("export", "--model", small_model, "--format", form, "--to", tmp_path / "m.gguf")
    assert ended.code == 2 and "File too large: raise the file size limit" in ended.err
    assert "Traceback" not in ended.err and list(tmp_path.iterdir()) == []


def test_being_told_to_end_is_ctrl_c(cli, monkeypatch):
    monkeypatch.setattr(export_job, "export", lambda options, report: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cli("export", "--model", "a/b", "--to", "there")[::2] == (130, "fettle: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_steps_are_a_few_lines_of_python(small_model, chats, tmp_path):
    """As the package's docstring and README show them; the objects are those of transformers and PEFT."""
    model, tokenizer = fettle.load(small_model)
    rows = fettle.read_rows(chats)
    train_rows, held_out = fettle.split_held_out(rows, 0.1, seed=0)
    tokenized = fettle.tokenize_rows(train_rows, tokenizer, max_length=64)
    packs = fettle.pack(tokenized.examples, max_length=64)
    adapted = fettle.adapt(model, rank=4)
    assert isinstance(adapted, PeftModel) and len(held_out) == 2
    loss = adapted(**fettle.collator(tokenizer)([packs[0]])).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    merged = fettle.merge(adapted.eval(), tokenizer)
    fettle.save_model(merged, tokenizer, tmp_path / "merged")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize(("missing", "expected"), [(False, version("fettle-llm")), (True, "0+source")])
def test_the_version_comes_from_the_package_without_importing_torch(missing, expected):
    hide = "import importlib.metadata as m; m.distribution = Mock(side_effect=m.PackageNotFoundError)"
    program = f"""
import sys
from unittest.mock import Mock
{hide if missing else ""}
import fettle
from fettle.cli import main
try:
    main(["--version"])
finally:
    print(fettle.__version__, "torch" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.splitlines() == [f"fettle {expected}", f"{expected} False"]
    assert ended.returncode == 0, ended.stderr


def test_the_next_commands_work_as_printed(cli, small_model, chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "train",
        "--model",
        small_model,
        "--data",
        chats,
        "--max-steps",
        1,
        "--samples",
        2,
        "--device",
        "cpu",
    )
    ended = cli(*words, "--output", "my run.v1/", "--eval-fraction", 0.2)
    assert ended.code == 0, ended.err
    lines = [line.strip() for line in ended.out.partition("next:")[2].splitlines()]
    generate, _, merge, gguf, _ = (shlex.split(line) for line in lines if line)
    assert generate[1:4] == ["generate", "--model", "my run.v1"]
    assert cli(*generate[1:], "--max-new-tokens", 2).code == 0
    assert cli(*merge[1:]).code == 0 and (tmp_path / "my run.v1-merged" / "config.json").exists()
    assert gguf[gguf.index("--to") + 1] == "my run.v1.gguf"
    assert "before training: answering 2 held-out rows" in ended.out
    assert "after training: answering 2 held-out rows" in ended.out
