"""A GGUF file in llama.cpp says what stock transformers says of the checkpoint it was made from."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fettle.adapters.lora import adapt
from fettle.data import read_rows, tokenize_rows
from fettle.engine.llama_cpp import library as llama_library
from fettle.engine.llama_cpp.gguf_file import CHUNK_TOKENS, SMALLEST_CONTEXT, GGUFFile
from fettle.engine.llama_cpp.tokenizer import offsets
from fettle.engine.load import load
from fettle.engine.request import Sampling
from fettle.engine.text import generate
from fettle.errors import UserError
from fettle.export.gguf import write_gguf
from fettle.models.decoder import causal_lm_class
from fettle.models.load import load_tokenizer

PROMPT = "What is the capital of France?"
TEXTS = [
    "The quick brown fox jumps over the lazy dog; 12 345.",
    "<|user|>\nSay 7.<|end|>\n<|assistant|>\nHere is 7!<|end|>\n",
    "  spaces,\n\n\tlines and naïve café ☕ 你好 🦊🦊",
    "",
]

# fp16 keys and values, as llama.cpp keeps them, in a model that sees nothing but noise: 7e-6 was measured.
ALLOWED_KL = 3e-5


@pytest.fixture(scope="module")
def opened(gguf_pair):
    return load(gguf_pair.file)


@pytest.fixture(scope="module")
def stock(gguf_pair):
    model = AutoModelForCausalLM.from_pretrained(gguf_pair.folder).eval()
    return model, AutoTokenizer.from_pretrained(gguf_pair.folder)


def ids_of_length(length: int) -> torch.Tensor:
    return torch.tensor([[(7 * n * n + 31 * n) % 330 + 5 for n in range(length)]])


@torch.no_grad()
def kl(model, other, ids: torch.Tensor) -> float:
    """Mean KL(other || model) in nats."""
    found = model(ids).logits[0].double().log_softmax(-1)
    expected = other(ids).logits[0].double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("length", [1, 24, CHUNK_TOKENS + 1, SMALLEST_CONTEXT + 200])
def test_logits_are_those_of_transformers(opened, stock, length):
    assert kl(opened[0], stock[0], ids_of_length(length)) < ALLOWED_KL


def test_chosen_logits_are_those_of_all(opened):
    ids = ids_of_length(CHUNK_TOKENS + 40)
    chosen = torch.tensor([0, 7, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 39])
    with torch.no_grad():
        everything = opened[0](ids).logits
        assert torch.equal(opened[0](ids, logits_to_keep=chosen).logits, everything[:, chosen])
        assert torch.equal(opened[0](ids, logits_to_keep=1).logits, everything[:, -1:])


def test_what_was_run_before_changes_nothing(opened, stock):
    """Texts that share a beginning, then one that shares none, then a shorter one."""
    ids = ids_of_length(60)
    other = ids.flip(1)
    for text in (ids[:, :40], ids, other, ids[:, :30], ids[:, :30]):
        found = opened[0](text, use_cache=True, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        with torch.no_grad():
            expected = stock[0](text).logits[0, -1].log_softmax(-1)
        assert (found - expected).abs().max() < 0.02  # another text's next token is off by more than 1


@pytest.mark.parametrize("text", TEXTS)
def test_ids_offsets_and_words_are_the_tokenizers_own(opened, stock, text):
    ours, theirs = (
        tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
        for tokenizer in (opened[1], stock[1])
    )
    assert all(ours[name] == theirs[name] for name in ("input_ids", "offset_mapping"))
    for skips in (True, False):
        words = [t.decode(ours["input_ids"], skip_special_tokens=skips) for t in (opened[1], stock[1])]
        assert words[0] == words[1]


def test_rows_become_the_same_examples(opened, stock, chats):
    rows = read_rows(chats)
    ours, theirs = (
        tokenize_rows(rows, tokenizer, max_length=64).examples for tokenizer in (opened[1], stock[1])
    )
    assert ours == theirs


def test_an_answer_ends_at_the_end_of_turn(opened, stock):
    ends = [stock[1].convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>")]
    assert set(opened[0].generation_config.eos_token_id) == set(ends)


def test_greedy_answers_are_those_of_the_checkpoint(opened, gguf_pair):
    folder = load(gguf_pair.folder, device="cpu")
    for prompt in (PROMPT, "Say 3.", "The quick brown"):
        for raw in (True, False):
            answers = [
                generate(*loaded, prompt, raw=raw, sampling=Sampling(max_new_tokens=24))
                for loaded in (opened, folder)
            ]
            assert answers[0] == answers[1] != ""


def test_the_commands_say_the_same_of_both(cli, gguf_pair):
    settings = ("--max-new-tokens", 12, "--device", "cpu", "--system", "Be brief.")
    lines = f"{PROMPT}\nSay 3.\n/new\nSay 4.\n"
    said = []
    for model in gguf_pair:
        one = cli("generate", "--model", model, "--prompt", PROMPT, *settings)
        talk = cli("chat", "--model", model, "--temperature", 0, *settings, stdin=lines)
        assert (one.code, one.err, talk.code) == (0, "", 0)
        said.append((one.out, talk.out))
    assert said[0] == said[1]
    assert said[0][1].startswith(said[0][0]) and said[0][1].count("\n") >= 3


def test_sampling_is_repeated_by_its_seed(opened):
    drawn = [
        generate(*opened, PROMPT, sampling=Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_file_without_the_usual_ending_is_known_by_its_head(gguf_pair, tmp_path):
    (blob := tmp_path / "sha256-0123").symlink_to(gguf_pair.file)
    assert generate(*load(blob), PROMPT, sampling=Sampling(max_new_tokens=4))


def test_a_file_that_is_left_is_closed(gguf_pair):
    model, tokenizer = load(gguf_pair.file)
    model(ids_of_length(4))
    gone = weakref.ref(model.file)
    del model, tokenizer
    gc.collect()
    assert gone() is None


def test_a_script_that_holds_a_file_at_its_end_ends_well(gguf_pair):
    script = (
        "import fettle, torch\n"
        f"model, tokenizer = fettle.load({str(gguf_pair.file)!r})\n"
        "print(model(torch.tensor([[1, 2, 3]])).logits.shape)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout[:17]) == (0, "torch.Size([1, 3,"), ended.stderr


@pytest.mark.parametrize(
    ("text", "pieces", "spans"),
    [
        ("Hi you", [b"<s>", b" Hi", b" you"], [(0, 0), (0, 2), (2, 6)]),  # a token and a space were added
        ("<|u|>\nHi", [b"<|u|>", b" Hi"], [(0, 6), (6, 8)]),  # the tag took the line break in
        (
            "<|u|>é!",
            [b"<|u|>", b" ", b"\xc3\xa9", b"!"],
            [(0, 5), (5, 6), (5, 6), (6, 7)],
        ),  # a space by itself
        ("<|u|>\né", [b"<|u|>", b" ", b"\xc3", b"\xa9"], [(0, 6), (6, 7), (6, 7), (6, 7)]),
        ("a<|u|>\n", [b"a", b"<|u|>"], [(0, 1), (1, 7)]),
        ("é!", [b"\xc3", b"\xa9", b"!"], [(0, 1), (0, 1), (1, 2)]),
        ("a b", [b"a", b" ", b"b", b"</s>"], [(0, 1), (1, 2), (2, 3), (3, 3)]),
    ],
)
def test_tokens_are_found_in_the_text(text, pieces, spans):
    assert offsets(text, pieces) == spans


def test_tokens_of_another_text_are_refused():
    with pytest.raises(UserError, match="cannot be aligned with this text"):
        offsets("Hello", [b"Good", b"bye"])


def test_without_the_wheel_the_line_to_type_is_said(monkeypatch, gguf_pair):
    monkeypatch.setattr(llama_library.importlib.util, "find_spec", lambda name: None)
    llama_library.library.cache_clear()
    with pytest.raises(UserError, match="pip install xllamacpp"):
        load(gguf_pair.file)
    llama_library.library.cache_clear()


def test_another_interface_is_refused_and_the_release_to_install_is_said(monkeypatch):
    monkeypatch.setattr(llama_library, "DEFAULT_SIZES", (512, 2048, 512, 7))
    with pytest.raises(UserError, match=r"\(512, 2048, 512, 1\), expected \(512, 2048, 512, 7\)") as error:
        llama_library.library.__wrapped__()
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"xllamacpp=={llama_library.TESTED_RELEASE}\n" in constraints
    assert str(error.value).endswith(f"xllamacpp=={llama_library.TESTED_RELEASE}.")


def test_a_long_token_is_whole(gguf_pair, tmp_path):
    tokenizer, config = load_tokenizer(gguf_pair.folder), AutoConfig.from_pretrained(gguf_pair.folder)
    tokenizer.add_tokens([AddedToken(long := f"<|{'x' * 700}|>", special=True)])
    config.vocab_size = len(tokenizer)
    model = causal_lm_class("qwen2")(config)
    write_gguf(model.state_dict().items(), config, tokenizer, {"f16": tmp_path / "m.gguf"})
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.piece(len(tokenizer) - 1) == long.encode()


def test_a_file_cannot_be_adapted(opened, gguf_pair):
    with pytest.raises(UserError, match=r"model\.gguf is a GGUF file.* load the folder"):
        adapt(opened[0])


def test_text_that_is_not_cut_is_refused(gguf_pair, monkeypatch):
    file = GGUFFile(gguf_pair.file)
    monkeypatch.setattr(file, "_llama", SimpleNamespace(llama_tokenize=lambda *_: -3))
    with pytest.raises(UserError, match="cannot tokenize a text of 5 bytes"):
        file.tokenize("a b c", add_special=False)
    monkeypatch.undo()
