"""Real tokenizers, templates, configurations and rows, from the checkpoint folder to the trained one.

The models are real but for their size: fewer and narrower layers with random weights. Vocabulary, rope type and
scaling, windows and soft caps are those of the checkpoint.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fettle.data import read_rows, tokenize_rows
from fettle.models.load import load_tokenizer

CHECKPOINTS = {
    "Phi-3.5-mini-instruct": "<|end|>",
    "Llama-3.1-8B-Instruct": "<|eot_id|>",
    "Mistral-7B-Instruct-v0.3": "</s>",
    "gemma-2-9b-it": "<end_of_turn>",
    "TinyLlama-1.1B-Chat-v1.0": "</s>",
    "zephyr-7b-beta": "</s>",
}
FILES = ["alpaca_en_demo.json", "sharegpt_dummy_conversation.json", "identity.json"]
ROWS = 60  # of each file
STEPS = 10
HEADS, HEAD_DIM = 4, 16
SMALL = {
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
}
AWKWARD = [  # where tokenizers rebuilt by another rule differ
    *(
        "hello",
        " hello",
        "  two  spaces",
        "\n\nlines\n",
        "tab\there",
        "naïve café",
        "你好，世界",
        "🙂",
        "1234567",
    ),
    *("<|user|>\nhello<|end|>\n<|assistant|>\n hi", "[INST] hello [/INST] hi</s>", "<s>hello</s>hello"),
    "<start_of_turn>user\nhello<end_of_turn>\n",
]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


# A vocabulary of 128,000 or 256,000 takes its time, whatever the layers.
LARGE = ("Llama-3.1-8B-Instruct", "gemma-2-9b-it")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in CHECKPOINTS],
)
def original(request, shared_data) -> Path:
    return shared_data / "checkpoints" / request.param


@pytest.fixture(scope="module")
def stock_tokenizer(original):
    return AutoTokenizer.from_pretrained(original)


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory) -> Path:
    """The checkpoint's own files, a config.json with other sizes, and random weights."""
    folder = tmp_path_factory.mktemp("real") / original.name
    shutil.copytree(original, folder)
    config = json.loads((original / "config.json").read_text()) | SMALL
    if "head_dim" in config:
        config |= {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM}
    scaling = config.get("rope_scaling") or {}
    for name in {"short_factor", "long_factor"} & scaling.keys():
        scaling[name] = scaling[name][: HEAD_DIM // 2]
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger than a new model's, or an adapter could not move the logits
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))  # as the checkpoint has it, not as it is saved
    return folder


@pytest.fixture(scope="module")
def rows(shared_data, tmp_path_factory) -> Path:
    """A folder with the first rows of each file."""
    folder = tmp_path_factory.mktemp("rows")
    for name in FILES:
        some = json.loads((shared_data / "train" / name).read_text())[:ROWS]
        (folder / name).write_text(json.dumps(some, ensure_ascii=False))
    return folder


@pytest.fixture(scope="module")
def output(checkpoint, rows, cli, tmp_path_factory) -> Path:
    """What a few steps of `fettle train` leave."""
    folder = tmp_path_factory.mktemp("output") / "run"
    ended = cli(
        *("train", "--model", checkpoint, "--data", rows, "--output", folder, "--device", "cpu"),
        *("--max-steps", STEPS, "--max-length", 96, "--learning-rate", 0.03, "--alpha", 32, "--samples", 0),
        *("--eval-steps", STEPS, "--save-steps", STEPS, "--eval-fraction", 0.02),
    )
    assert ended.code == 0, ended.err
    (folder / "said.txt").write_text(ended.out)
    return folder


def tokenizer_alone(folder: Path, to: Path):
    """The tokenizer of a folder, without the config.json or the adapter beside it."""
    to.mkdir()
    for file in folder.iterdir():
        if re.match(r"token|special|chat_template", file.name):
            shutil.copy(file, to)
    return AutoTokenizer.from_pretrained(to)


def test_the_trained_part_is_the_assistants_words_and_the_end_token(checkpoint, rows):
    end = CHECKPOINTS[checkpoint.name]
    read = read_rows(rows)
    tokenizer = load_tokenizer(checkpoint)
    tokenized = tokenize_rows(read, tokenizer, max_length=10**6)
    assert len(tokenized.examples) == len(read) > 2 * ROWS
    assert tokenized.summary.end_of_turn == end
    for row, example in zip(read, tokenized.examples, strict=True):
        trained = tokenizer.decode([label for label in example.labels if label != -100])
        words = [turn["content"].strip() for turn in row.messages if turn["role"] == "assistant"]
        assert [part.strip() for part in trained.split(end)] == [*words, ""], row.where


def test_the_loss_falls(output):
    """On rows that were held out: always the same ones, where each step's own loss is of other rows."""
    state = json.loads(max(output.glob("checkpoints/*/trainer_state.json")).read_text())
    assert state["global_step"] == STEPS
    before = json.loads((output / "facts.json").read_text())["before"]["held_out"]["loss"]
    (after,) = (entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)
    assert after < before - 0.2


def test_what_was_understood_is_said(output):
    said = (output / "said.txt").read_text()
    assert re.search(r"\d+ rows \(\d+ Alpaca, \d+ ShareGPT\) became \d+ examples", said)
    assert re.search(r"\d+ rows truncated to 96 tokens", said)
    assert re.search(r"⟦.+", said.partition("trained part between ⟦ and ⟧:")[2])


def test_the_saved_folder_alone_tokenises_as_the_original(stock_tokenizer, output, rows, tmp_path):
    """Ids, ids of rendered chats, decoded text and special tokens."""
    stock, saved = stock_tokenizer, tokenizer_alone(output, tmp_path / "alone")
    chats = [list(row.messages) for row in read_rows(rows)[::6]]
    texts = [*AWKWARD, *(turn["content"] for chat in chats for turn in chat)]
    for text in texts:
        ids = stock(text)["input_ids"]
        assert saved(text)["input_ids"] == ids, text
        assert saved.decode(ids) == stock.decode(ids)
        assert saved.decode(ids, skip_special_tokens=True) == stock.decode(ids, skip_special_tokens=True)
    for chat in chats:
        assert saved.apply_chat_template(chat)["input_ids"] == stock.apply_chat_template(chat)["input_ids"]
    assert (saved.bos_token_id, saved.eos_token_id) == (stock.bos_token_id, stock.eos_token_id)
    assert saved.chat_template == stock.chat_template


@torch.no_grad()
def test_stock_peft_and_generate_say_the_same(stock_tokenizer, output, checkpoint, cli):
    prompt, tokenizer = "Who are you?", stock_tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, output).eval()
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(CHECKPOINTS[checkpoint.name])]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    made = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    ended = cli("generate", "--model", output, "--prompt", prompt, "--max-new-tokens", 8)
    assert (ended.code, ended.err) == (0, "")
    keep = {"skip_special_tokens": True}
    assert ended.out == tokenizer.decode(made[0], **keep)[len(tokenizer.decode(ids[0], **keep)) :] + "\n"


def test_the_exported_folder_is_whole(original, output, cli, tmp_path):
    ended = cli("export", "--model", output, "--to", tmp_path / "merged")
    assert ended.code == 0, ended.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == json.loads((original / "config.json").read_text())["architectures"][0]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # so it tokenises alike
        assert (tmp_path / "merged" / name).read_bytes() == (output / name).read_bytes()
