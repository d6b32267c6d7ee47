"""What a user can get wrong, through the command line: one sentence, exit code 2, and nothing left behind."""

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch
from huggingface_hub import constants, hf_api
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fettle.adapters.lora import LoraLinear

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

STRICT_TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def tree(folder: Path) -> set[tuple[str, int]]:
    """Every file and folder, with sizes: what was there before a refused command must be there after it."""
    return {
        (str(path.relative_to(folder)), path.stat().st_size if path.is_file() else -1)
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(cli, tmp_path) -> Callable[..., str]:
    """Run a command that must be refused; return its one sentence."""

    def run(*words: object, stdin: str | TextIO = "", says: tuple[str, ...] | str = ()) -> str:
        before = tree(tmp_path)
        ended = cli(*words, stdin=stdin)
        assert ended.code == 2, (ended.code, ended.out, ended.err)
        # what goes on is told there too, where the fault is found only afterwards
        sentence = ended.err.removesuffix("\n").removeprefix("timing one layer of the model on the cpu\n")
        assert sentence.startswith("fettle: error: ")
        assert "\n" not in sentence, sentence
        assert "Traceback" not in ended.out
        assert tree(tmp_path) == before
        for words_ in (says,) if isinstance(says, str) else says:
            assert words_ in sentence
        return sentence

    return run


@pytest.fixture
def refused_train(refused, small_model, chats, tmp_path) -> Callable[..., str]:
    """A training command, sound but for the options given; `model=None` leaves that option out."""

    def run(*more: object, says: tuple[str, ...] | str, **options: object) -> str:
        given = {"model": small_model, "data": chats, "output": tmp_path / "out", "max_steps": 1} | options
        words = [
            word
            for name, value in given.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", value)
        ]
        return refused("train", *words, *more, says=says)

    return run


@pytest.fixture
def model_copy(small_model, tmp_path) -> Path:
    """A copy of the small checkpoint, to be damaged."""
    return Path(shutil.copytree(small_model, tmp_path / "model"))


@pytest.fixture
def strict_model(model_copy) -> Path:
    (model_copy / "chat_template.jinja").write_text(STRICT_TEMPLATE)
    return model_copy


@pytest.fixture
def plain_model(model_copy) -> Path:
    (model_copy / "chat_template.jinja").unlink()
    return model_copy


def chat_row(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


GOOD = chat_row(("user", "Say 1."), ("assistant", "Here is 1!"))


# --- data --------------------------------------------------------------------------------------------------

BAD_FILES = [
    ("empty.jsonl", b"", ["empty.jsonl", "empty"]),
    ("blank.jsonl", b"\n \n", ["blank.jsonl", "empty"]),
    ("list.json", b"[]", ["list.json", "no rows"]),
    ("photo.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", ["photo.jsonl", "binary"]),
    ("latin.jsonl", b'{"text": "caf\xe9"}\n', ["latin.jsonl, line 1", "0xe9 is not UTF-8"]),
    ("table.parquet", b"PAR1 and then nothing", ["table.parquet", "parquet"]),
    ("notes.docx", b"PK\x03\x04", ["notes.docx", "expected .jsonl"]),
    ("cut.jsonl", f"{GOOD}\n{GOOD[:30]}\n".encode(), ["cut.jsonl, line 2", "malformed JSON"]),
    ("cut.json", b'[\n{"text": "a"},\n{"text": "b"\n', ["cut.json, line 4", "malformed JSON"]),
    ("table.csv", b'prompt,completion\nHi,"Hello\n', ["table.csv, line 2", "malformed CSV"]),
    (
        "fields.jsonl",
        f'{GOOD}\n{{"question": "a"}}\n'.encode(),
        ["fields.jsonl, line 2", "question", "messages"],
    ),
    ("null.jsonl", b'{"prompt": "Hi", "completion": null}\n', ["null.jsonl, line 1", "completion"]),
    ("number.jsonl", b'{"prompt": "Hi", "completion": 3}\n', ["line 1", "`completion` is the number 3"]),
    ("role.jsonl", f"{GOOD}\n{chat_row(('narrator', 'x'))}".encode(), ["role.jsonl, line 2", '"narrator"']),
    ("user.jsonl", chat_row(("user", "x")).encode(), ["user.jsonl, line 1", "no assistant turn"]),
    ("dpo.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', ["line 1", "preference data"]),
]


@pytest.mark.parametrize(("name", "content", "says"), BAD_FILES, ids=[file[0] for file in BAD_FILES])
@pytest.mark.parametrize("option", ["data", "eval_data", "keep_data"])
def test_a_bad_file_is_named_with_its_row(refused_train, tmp_path, name, content, says, option):
    (tmp_path / name).write_bytes(content)
    refused_train(**{option: tmp_path / name}, says=says)


@pytest.mark.parametrize("option", ["data", "eval_data", "keep_data"])
def test_missing_data(refused_train, tmp_path, option):
    refused_train(**{option: tmp_path / "gone.jsonl"}, says=("gone.jsonl", "no such file"))


def test_a_folder_without_data(refused_train, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    refused_train(data=tmp_path / "photos", says=("photos", "no data files"))


def test_two_user_turns_running_where_the_template_forbids_it(refused_train, strict_model, tmp_path):
    row = chat_row(("user", "Hi"), ("user", "there"), ("assistant", "Hello"))
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{GOOD}\n{row}\n")
    says = ("rows.jsonl, line 3", "Conversation roles must alternate")
    refused_train(model=strict_model, data=tmp_path / "rows.jsonl", says=says)


def test_a_held_out_row_that_the_template_refuses(refused_train, strict_model, tmp_path):
    row = chat_row(("assistant", "Hello"), ("user", "Hi"), ("assistant", "Hello"))
    (tmp_path / "held_out.jsonl").write_text(f"{GOOD}\n{row}\n")
    says = ("held_out.jsonl, line 2", "Conversation roles must alternate")
    refused_train(model=strict_model, eval_data=tmp_path / "held_out.jsonl", says=says)


def test_rows_with_nothing_to_train_on_are_named_and_counted(cli, small_model, tmp_path):
    long = chat_row(("user", "Say " + "1 " * 300), ("assistant", "Here is 1!"))
    empty = chat_row(("user", "Say 2."), ("assistant", " "))
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{long}\n{empty}\n{long}\n")
    words = ("train", "--model", small_model, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    ended = cli(*words, "--max-steps", 1, "--samples", 0)
    assert ended.code == 0
    assert "3 rows dropped: 2 because its answer begins after the first 256 tokens" in ended.out
    assert "1 because the assistant's turn is empty" in ended.out
    assert all(f"rows.jsonl, line {number}: " in ended.out for number in (2, 3, 4))


@pytest.mark.parametrize(
    ("content", "length", "says"),
    [
        ("Say " + "1 " * 90, 20, "2 because its answer begins after the first 20 tokens"),
        ("Say 1.", 2, "2 because its answer begins after the first 2 tokens"),
    ],
)
def test_an_error_when_no_row_is_left(refused_train, tmp_path, content, length, says):
    row = chat_row(("user", content), ("assistant", "Here is 1!"))
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row}\n")
    says = ("2 of 2 rows dropped", says)
    refused_train(data=tmp_path / "rows.jsonl", max_length=length, says=says)


def test_only_empty_answers(refused_train, tmp_path):
    (tmp_path / "rows.jsonl").write_text(chat_row(("user", "Hi"), ("assistant", "")))
    says = ("1 of 1 rows dropped", "the assistant's turn is empty")
    refused_train(data=tmp_path / "rows.jsonl", says=says)


def test_all_rows_held_out(refused_train):
    refused_train(eval_fraction=0.99, says=("--eval-fraction 0.99", "all 24 rows"))


# --- the model ---------------------------------------------------------------------------------------------


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:24] = b"\xff\xfe{{"
    file.write_bytes(bytes(content))


def _pickle_instead(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def _drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _change_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


DAMAGE = {
    "no config": (_remove("config.json"), ["model", "config.json"]),
    "no weights": (_remove("model.safetensors"), ["model", "model.safetensors is missing"]),
    "no tokenizer": (_remove("tokenizer.json"), ["model", "has no tokenizer"]),
    "malformed config": (_write("config.json", b'{\n"model_type": phi3}'), ["config.json", "line 2"]),
    "malformed tokenizer": (_write("tokenizer.json", b"{"), ["tokenizer.json", "line 1"]),
    "empty weights": (_write("model.safetensors", b""), ["model.safetensors is empty"]),
    "git-lfs note": (
        _write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"),
        ["git-lfs pointer", "git lfs pull"],
    ),
    "absurd header": (
        _write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        ["model.safetensors is not a valid safetensors file"],
    ),
    "truncated": (_truncate, ["model.safetensors is truncated", "100 bytes missing"]),
    "corrupt": (_corrupt_header, ["model.safetensors is not a valid safetensors file"]),
    "pickled": (_pickle_instead, ["pytorch_model.bin", "never loads"]),
    "a tensor short": (_drop_a_tensor, ["1 of", "missing", "model.layers.1.mlp.down_proj.weight"]),
    "of another model": (_change_config(hidden_size=64), ["shape", "config.json implies"]),
    "unknown family": (_change_config(model_type="gpt2"), ["config.json", "'gpt2'", "phi3"]),
    "quantised": (
        _change_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["config.json", "quantized in a format other than"],
    ),
}


@pytest.mark.parametrize("command", ["train", "generate", "chat", "export"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(refused, model_copy, chats, tmp_path, command, damage):
    harm, says = DAMAGE[damage]
    harm(model_copy)
    words = {
        "train": ("--data", chats, "--output", tmp_path / "out"),
        "generate": ("--prompt", "Hi"),
        "chat": (),
        "export": ("--to", tmp_path / "out"),
    }
    refused(command, "--model", model_copy, *words[command], says=says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", ("gone", "no such folder")),
        ("models/gone", ("models/gone", "HF_HUB_OFFLINE is set")),
        ("", "model's name is empty"),
    ],
)
def test_a_model_that_is_nowhere(refused, tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    refused("generate", "--model", name, "--prompt", "Hi", says=says)


@pytest.mark.parametrize("command", ["generate", "train", "export"])
def test_a_hub_name_with_no_network(refused, chats, tmp_path, monkeypatch, command):
    """No one answers at port 9; the hub's address is read when its client is imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    words = {
        "train": ("--data", chats, "--output", tmp_path / "out"),
        "generate": ("--prompt", "Hi"),
        "export": ("--to", tmp_path / "out"),
    }
    says = ("some-one/some-model", "hub cannot be reached", "check the network")
    refused(command, "--model", "some-one/some-model", *words[command], says=says)


def test_hub_data_with_no_network(refused_train):
    refused_train(data="some-one/some-data", says=("some-one/some-data", "hub", "network"))


def test_a_file_as_a_model(refused, chats, tmp_path):
    refused("generate", "--model", chats, "--prompt", "Hi", says=("chats.jsonl is a file, not a model"))


def test_remote_code_is_never_run(cli, model_copy, chats, tmp_path):
    """A checkpoint's own code is left alone: the family's is used."""
    _change_config(auto_map={"AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.Trap"})(model_copy)
    mark = tmp_path / "ran"
    (model_copy / "trap.py").write_text(f"open({str(mark)!r}, 'w')\nclass Trap: pass\n")
    file = model_copy / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["trap.Trap", None]}}
    file.write_text(json.dumps(config))
    ended = cli("generate", "--model", model_copy, "--prompt", "Hi", "--max-new-tokens", 2)
    assert ended.code in (0, 2) and "Traceback" not in ended.err
    assert not mark.exists()


# --- adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def move_base(adapter: Path, base: object) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("command", ["generate", "chat", "export"])
def test_an_adapter_on_other_weights(refused, adapter_copy, model_copy, tmp_path, command):
    weights = load_file(model_copy / "model.safetensors")
    weights["lm_head.weight"] += 0.01
    save_file(weights, model_copy / "model.safetensors", {"format": "pt"})
    move_base(adapter_copy, model_copy)
    words = {"generate": ("--prompt", "Hi"), "chat": (), "export": ("--to", tmp_path / "out")}
    says = ("adapter", "trained on different weights from those", str(model_copy), "adapter_config.json")
    refused(command, "--model", adapter_copy, *words[command], says=says)


def test_a_stock_adapter_of_another_shape(refused, small_model, tmp_path):
    """Without fettle's note the shapes have to tell."""
    config = AutoModelForCausalLM.from_pretrained(small_model).config
    config.intermediate_size = 96
    other = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(other, LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    move_base(tmp_path / "adapter", small_model)
    says = ("belongs to another model", "expects 96 inputs", "has 64")
    refused("generate", "--model", tmp_path / "adapter", "--prompt", "Hi", says=says)


def test_an_adapter_whose_base_has_gone(refused, adapter_copy, tmp_path):
    move_base(adapter_copy, tmp_path / "gone")
    says = ("gone", "base_model_name_or_path", "adapter_config.json")
    refused("generate", "--model", adapter_copy, "--prompt", "Hi", says=says)


def test_an_adapter_without_weights(refused, adapter_copy):
    (adapter_copy / "adapter_model.safetensors").unlink()
    says = "adapter_model.safetensors is missing"
    refused("generate", "--model", adapter_copy, "--prompt", "Hi", says=says)


def test_training_on_an_adapter(refused_train, trained):
    refused_train(model=trained, says=("is an adapter", "merge it first", "fettle export"))


# --- options -----------------------------------------------------------------------------------------------

NONSENSE = [
    ("--rank", "0"),
    ("--rank", "-4"),
    ("--rank", "1.5"),
    ("--alpha", "0"),
    ("--alpha", "nan"),
    ("--learning-rate", "0"),
    ("--learning-rate", "-1"),
    ("--learning-rate", "nan"),
    ("--learning-rate", "inf"),
    ("--learning-rate", "fast"),
    ("--epochs", "0"),
    ("--epochs", "-1"),
    ("--max-steps", "0"),
    ("--max-length", "0"),
    ("--batch-size", "-1"),
    ("--gradient-accumulation-steps", "0"),
    ("--eval-fraction", "1"),
    ("--eval-fraction", "-0.1"),
    ("--eval-fraction", "1.5"),
    ("--eval-steps", "0"),
    ("--save-steps", "0"),
    ("--warmup-ratio", "1.2"),
    ("--warmup-ratio", "nan"),
    ("--dropout", "1"),
    ("--dropout", "-0.5"),
    ("--weight-decay", "-1"),
    ("--max-grad-norm", "0"),
    ("--samples", "-1"),
    ("--seed", "-1"),
    ("--seed", str(2**40)),
    ("--schedule", "cosin"),
    ("--train-on", "user"),
    ("--dtype", "int8"),
    ("--device", "foo"),
]


@pytest.mark.parametrize(("option", "value"), NONSENSE)
def test_a_value_that_cannot_be_meant(refused_train, option, value):
    refused_train(option, value, says=(option, value.split(".")[0]))


NONSENSE_SAMPLING = [
    ("--max-new-tokens", "0"),
    ("--max-new-tokens", "-5"),
    ("--max-new-tokens", "many"),
    ("--temperature", "-0.1"),
    ("--temperature", "nan"),
    ("--temperature", "inf"),
    ("--top-p", "0"),
    ("--top-p", "1.1"),
    ("--top-p", "nan"),
    ("--seed", "-1"),
    ("--seed", str(2**80)),
    ("--dtype", "int8"),
    ("--device", "foo"),
]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(("option", "value"), NONSENSE_SAMPLING)
def test_a_sampling_value_that_cannot_be_meant(refused, small_model, command, option, value):
    prompt = ("--prompt", "Hi") if command == "generate" else ()
    refused(command, "--model", small_model, *prompt, option, value, says=(option, value))


NONSENSE_SIZES = [
    (("--vocab-size", "100"), ("--vocab-size", "100")),
    (("--vocab-size", "0"), "--vocab-size"),
    (("--hidden-size", "33", "--heads", "2"), ("--hidden-size 33", "--heads 2")),
    (("--hidden-size", "6", "--heads", "2"), ("--hidden-size 6", "--heads 2", "even")),
    (("--heads", "4", "--key-value-heads", "3"), ("--heads 4", "--key-value-heads 3")),
    (("--key-value-heads", "0"), "--key-value-heads"),
    (("--layers", "0"), "--layers"),
    (("--intermediate-size", "-1"), "--intermediate-size"),
    (("--context", "0"), "--context"),
    (("--context", "64", "--max-length", "65"), ("--max-length", "65", "64")),
    (("--family", "gpt2"), ("--family", "gpt2")),
    (("--rank", "4"), "unknown option --rank"),
]


@pytest.mark.parametrize(("words", "says"), NONSENSE_SIZES, ids=lambda value: " ".join(value))
def test_a_model_that_cannot_be_made(refused, chats, tmp_path, words, says):
    refused("pretrain", "--data", chats, "--output", tmp_path / "out", "--max-steps", 1, *words, says=says)


def test_a_context_longer_than_the_models(refused_train):
    refused_train(max_length=257, says=("--max-length", "257", "256 tokens"))


@pytest.mark.parametrize("targets", [["nonsense"], ["o_proj", "q_proj"]])  # Phi-3 has one qkv_proj
def test_layers_that_the_model_does_not_have(refused_train, targets):
    says = (f"'{targets[-1]}'", "--target-modules", "qkv_proj, o_proj")
    refused_train("--target-modules", *targets, says=says)


@pytest.mark.parametrize("targets", [["lm_head"], ["o_proj", "lm_head"]])
def test_the_output_head_as_a_layer_to_adapt(refused_train, targets):
    refused_train("--target-modules", *targets, says=("--target-modules", "'lm_head'", "output head"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["train", "pretrain", "generate", "chat"])
def test_a_device_that_is_not_there(refused, small_model, chats, tmp_path, command):
    model = () if command == "pretrain" else ("--model", small_model)
    words = {"generate": ("--prompt", "Hi"), "chat": ()}
    training = ("--data", chats, "--output", tmp_path / "out")
    words = (*model, *words.get(command, training), "--device", "cuda")
    refused(command, *words, says=("--device", "cuda", "use cpu"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train",), "--model"),
        (("train", "--model", "x"), "--data"),
        (("generate", "--model", "x"), "--prompt"),
        (("generate", "--prompt", "x"), "--model"),
        (("export", "--model", "x"), "--to"),
        (("export", "--model", "x", "--to", "y", "--format", "onnx"), ("--format", "onnx")),
        (("train", "--lerning-rate", "1"), ("--lerning-rate", "--learning-rate")),
        (("trian",), ("trian", "train")),
        ((), "COMMAND"),
        (("train", "--config", "gone.yaml"), ("gone.yaml", "--config")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_command_that_is_incomplete_or_misspelt(refused, words, says):
    refused(*words, says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rank: many", ("run.yaml, line 1", "rank", "'many'")),
        ("model: x\nlerning_rate: 1", ("run.yaml, line 2", "learning_rate")),
        ("model: [", ("run.yaml, line 1", "not valid YAML")),
        ("", ("run.yaml", "no options")),
    ],
)
def test_a_bad_options_file(refused, tmp_path, text, says):
    (tmp_path / "run.yaml").write_text(text)
    refused("train", "--config", tmp_path / "run.yaml", "--output", tmp_path / "out", says=says)


# --- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", " \n"])
@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_an_empty_prompt(refused, small_model, prompt, raw):
    refused("generate", "--model", small_model, "--prompt", prompt, *raw, says="prompt is empty")
    refused("generate", "--model", small_model, "--prompt", "-", *raw, stdin=prompt, says="prompt is empty")


def test_a_prompt_longer_than_the_context(cli, refused, small_model):
    words = ("generate", "--model", small_model, "--prompt", "Say " + "1 " * 300)
    refused(*words, says=("The prompt has 6", "no room for an answer", "256 tokens"))
    refused(*words, "--max-new-tokens", 5, says=("5 new tokens (--max-new-tokens)", "256 tokens"))
    ended = cli("chat", "--model", small_model, stdin="1 " * 300 + "\n")
    assert (ended.code, ended.out) == (0, "")
    assert "256 tokens" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_a_prompt_that_leaves_too_little_room(refused, small_model):
    words = ("generate", "--model", small_model, "--prompt", "Say 1.", "--max-new-tokens", 256)
    refused(*words, says=("256 new tokens (--max-new-tokens)", "256 tokens"))


def test_a_prompt_that_is_not_text(refused, small_model):
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as a shell hands it over
    refused("generate", "--model", small_model, "--prompt", prompt, says="--prompt is not UTF-8")
    binary = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    refused("generate", "--model", small_model, "--prompt", "-", stdin=binary, says="--prompt is not UTF-8")


def test_a_model_without_a_template_has_no_turns(refused, plain_model):
    says = ("--system", "chat template")
    refused("generate", "--model", plain_model, "--prompt", "Hi", "--system", "Be brief.", says=says)
    refused("chat", "--model", plain_model, says=(str(plain_model), "no chat template", "fettle generate"))


def test_a_system_turn_with_a_raw_prompt(refused, small_model):
    words = ("generate", "--model", small_model, "--prompt", "Hi", "--system", "Be brief.", "--raw")
    refused(*words, says=("--system", "--raw"))


# --- the output folder -------------------------------------------------------------------------------------


def test_an_output_folder_that_holds_another_run(refused_train, adapter_copy):
    refused_train(output=adapter_copy, says=(str(adapter_copy), "another run", "run.yaml"))


def test_an_output_folder_that_holds_something_else(refused, refused_train, trained, chats, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    says = ("full", "thesis.txt", "choose another")
    refused_train(output=tmp_path / "full", says=says)
    refused("pretrain", "--data", chats, "--output", tmp_path / "full", says=says)
    refused("export", "--model", trained, "--to", tmp_path / "full", says=says)
    refused("quickstart", "--output", tmp_path / "full", says=says)


def test_an_output_folder_that_is_a_file(refused, refused_train, trained, tmp_path):
    (tmp_path / "file").write_text("x")
    refused_train(output=tmp_path / "file", says="file is a file")
    refused_train(output=tmp_path / "file" / "out", says="file is a file")
    refused("export", "--model", trained, "--to", tmp_path / "file", says="file is a file")


def test_too_little_disk_is_found_before_the_work(
    refused, refused_train, small_model, trained, chats, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    says = ("1.00 MB is free", str(tmp_path), "free some space")
    refused_train(says=says)
    refused("pretrain", "--data", chats, "--output", tmp_path / "out", "--max-steps", 1, says=says)
    refused("export", "--model", trained, "--to", tmp_path / "out", says=says)
    refused("export", "--model", small_model, "--to", tmp_path / "out", says=says)


# --- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_nothing_to_resume(refused, tmp_path, command):
    (tmp_path / "empty").mkdir()
    refused(
        command, "--resume", "--output", tmp_path / "empty", says=("empty", "no run to resume", "run.yaml")
    )
    refused(command, "--resume", "--output", tmp_path / "gone", says=("gone", "no run to resume"))


@pytest.mark.parametrize(
    "more", [("--rank", 4), ("--config", "run.yaml"), ("--max-steps", 100), ("--model", "x", "--data", "y")]
)
def test_resuming_takes_no_other_options(refused, adapter_copy, more):
    refused("train", "--resume", "--output", adapter_copy, *more, says="--resume accepts only --output")


def test_resuming_needs_the_folder(refused):
    refused("train", "--resume", says=("--resume", "--output"))


@pytest.fixture
def unfinished(adapter_copy) -> Path:
    """A run as a kill in its last moments leaves it: everything but the result and the report."""
    for name in ("report.html", "adapter_config.json", "adapter_model.safetensors"):
        (adapter_copy / name).unlink()
    return adapter_copy


def change_option(run: Path, name: str, value: object) -> None:
    file = run / "run.yaml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(f"{name}: {value}" if x.startswith(f"{name}:") else x for x in lines) + "\n")


def test_resuming_with_changed_data(refused, unfinished, chats, tmp_path):
    (tmp_path / "changed.jsonl").write_text(chats.read_text() + GOOD + "\n")
    change_option(unfinished, "data", tmp_path / "changed.jsonl")
    says = ("changed.jsonl", "has changed since the run started", "--output")
    refused("train", "--resume", "--output", unfinished, says=says)


def test_resuming_with_a_changed_base(refused, unfinished, model_copy):
    weights = load_file(model_copy / "model.safetensors")
    weights["lm_head.weight"] += 0.01
    save_file(weights, model_copy / "model.safetensors", {"format": "pt"})
    change_option(unfinished, "model", model_copy)
    says = (str(model_copy), "has changed since the run started")
    refused("train", "--resume", "--output", unfinished, says=says)


def test_resuming_with_damaged_notes(refused, unfinished):
    (unfinished / "facts.json").write_text("{")
    refused("train", "--resume", "--output", unfinished, says="facts.json")


def test_resuming_another_kind_of_run(refused, unfinished):
    refused("pretrain", "--resume", "--output", unfinished, says="run.yaml")


# --- a merge that went wrong -------------------------------------------------------------------------------


def test_a_wrong_merge_is_refused_and_nothing_is_written(refused, trained, chats, tmp_path, monkeypatch):
    """Where PEFT merges: fp8 with rows has the model in memory."""
    right = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, name: 2 * right(layer, name))
    says = ("differs from the adapter model", "nothing was written")
    words = ("export", "--model", trained, "--format", "fp8", "--data", chats)
    refused(*words, "--to", tmp_path / "out", says=says)


# --- GGUF files, and two models side by side ----------------------------------------------------------------

BAD_GGUF = [
    ("absent.gguf", None, ["absent.gguf cannot be read (No such file", "GGUF file"]),
    ("empty.gguf", lambda file: b"", ["empty.gguf is not a GGUF file", "expected b'GGUF'"]),
    ("page.gguf", lambda file: b"<html>", ["page.gguf is not a GGUF file: it begins with b'<htm'"]),
    ("head.gguf", lambda file: file[:4], "head.gguf is damaged"),
    ("entries.gguf", lambda file: file[:3000], "entries.gguf is damaged"),
    ("cut.gguf", lambda file: file[:-3000], "cut.gguf is damaged"),
    (
        "other.gguf",
        lambda file: file.replace(b"qwen2", b"qwen9"),
        ["other.gguf cannot be opened", "unknown model architecture: 'qwen9'"],
    ),
]


@pytest.mark.parametrize(("name", "spoil", "says"), BAD_GGUF, ids=[case[0] for case in BAD_GGUF])
def test_a_bad_gguf_file_is_named(refused, gguf_pair, small_model, chats, tmp_path, name, spoil, says):
    if spoil is not None:
        (tmp_path / name).write_bytes(spoil(gguf_pair.file.read_bytes()))
    refused("generate", "--model", tmp_path / name, "--prompt", "Say 1.", says=says)
    refused("chat", "--model", tmp_path / name, says=says)
    refused("compare", small_model, tmp_path / name, "--data", chats, says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--dtype", "float32"), "--dtype is float32, but a GGUF file"),
        (("--device", "cuda"), "--device is cuda, but the installed llama.cpp"),
        (("--max-new-tokens", 4000), "exceed the model's context of 2048 tokens"),
    ],
)
def test_what_a_gguf_file_cannot_do(refused, gguf_pair, words, says):
    refused("generate", "--model", gguf_pair.file, "--prompt", "Say 1.", *words, says=says)


def test_a_gguf_file_is_neither_trained_nor_exported(refused, gguf_pair, chats, tmp_path):
    says = "is a GGUF file, which can only be run"
    refused("train", "--model", gguf_pair.file, "--data", chats, "--output", tmp_path / "out", says=says)
    refused("export", "--model", gguf_pair.file, "--to", tmp_path / "out", says=says)


@pytest.mark.parametrize(
    ("content", "words", "says"),
    [
        ("", (), "rows.jsonl"),
        (chat_row(("user", "Say 1.")), (), ["rows.jsonl, line 1", "no assistant turn"]),
        (chat_row(("user", "Say 1."), ("assistant", " ")), (), ["Nothing is left", "turn is empty"]),
        (GOOD, ("--samples", 0), "--samples is 0; expected 1 or more"),
        (GOOD, ("--max-length", 1), "--max-length is 1; expected at least 2"),
    ],
)
def test_rows_that_cannot_be_compared(refused, small_model, tmp_path, content, words, says):
    (tmp_path / "rows.jsonl").write_text(content)
    refused("compare", small_model, small_model, "--data", tmp_path / "rows.jsonl", *words, says=says)


def test_a_wrong_second_model_is_found_before_the_first_is_loaded(refused, small_model, chats, monkeypatch):
    monkeypatch.setattr("fettle.evaluation.side_by_side.load_ref", None)
    refused("compare", small_model, "no/such-model", "--data", chats, says="no/such-model")
