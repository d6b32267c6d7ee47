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
from fettle.engine.llama_cpp.context import BATCH_TOKENS, SMALLEST_CONTEXT
from fettle.engine.llama_cpp.engine import LlamaCppEngine
from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.llama_cpp.tokenizer import offsets
from fettle.engine.load import load
from fettle.engine.request import Request, Sampling, ScoreRequest
from fettle.engine.text import Engine, generate
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


def log_probs_of(engine: LlamaCppEngine, ids: list[int], positions=None) -> torch.Tensor:
    """The engine's log-probabilities for the tokens at `positions`, all but the first by default."""
    found = []
    request = ScoreRequest(tokens=ids, positions=positions or range(1, len(ids)))
    engine.score([request], lambda _, log_probs: found.append(log_probs))
    return found[0]


@torch.no_grad()
def kl(engine: LlamaCppEngine, other, ids: torch.Tensor) -> float:
    """Mean KL(other || engine) in nats."""
    found = log_probs_of(engine, ids[0].tolist()).double()
    expected = other(ids).logits[0, :-1].double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.fixture
def engine(opened) -> LlamaCppEngine:
    return LlamaCppEngine(opened[0])


@pytest.mark.parametrize("length", [2, 24, BATCH_TOKENS + 1, SMALLEST_CONTEXT + 200])
def test_logits_are_those_of_transformers(engine, stock, length):
    assert kl(engine, stock[0], ids_of_length(length)) < ALLOWED_KL


def test_chosen_positions_are_those_of_all(engine):
    ids = ids_of_length(BATCH_TOKENS + 40)[0].tolist()
    chosen = [1, 7, BATCH_TOKENS - 1, BATCH_TOKENS, BATCH_TOKENS + 39]
    everything = log_probs_of(engine, ids)
    assert torch.equal(
        log_probs_of(LlamaCppEngine(engine.file), ids, chosen), everything[[p - 1 for p in chosen]]
    )


def test_what_was_run_before_changes_nothing(engine, stock):
    """Texts that share a beginning, then one that shares none, then a shorter one."""
    ids = ids_of_length(60)
    other = ids.flip(1)
    for text in (ids[:, :40], ids, other, ids[:, :30], ids[:, :30]):
        found = log_probs_of(engine, text[0].tolist(), [text.shape[1] - 1])[0]
        with torch.no_grad():
            expected = stock[0](text).logits[0, -2].log_softmax(-1)
        assert (found - expected).abs().max() < 0.02  # another text's next token is off by more than 1


@torch.no_grad()
def stock_answer(model, ids: list[int], new_tokens: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


def test_requests_of_all_lengths_run_together(opened, stock):
    """More of them than places, some with a beginning in common, some longer than the first context."""
    lengths = [3, 40, 700, 41, 8, SMALLEST_CONTEXT + 60, 42, 5, 300]
    prompts = [ids_of_length(n)[0].tolist() for n in lengths]
    engine = LlamaCppEngine(opened[0], running=4)
    requests = [Request(tokens=ids, sampling=Sampling(max_new_tokens=6 + n)) for n, ids in enumerate(prompts)]
    answers = engine.generate(requests)
    assert [answer.tokens for answer in answers] == [
        stock_answer(stock[0], ids, 6 + n) for n, ids in enumerate(prompts)
    ]
    assert not engine._places and not engine._waiting


def test_a_text_that_outgrows_the_context_continues_in_a_larger_one(opened, stock, monkeypatch):
    monkeypatch.setattr("fettle.engine.llama_cpp.engine.LONGEST_COMPLETION", 1)
    ids = ids_of_length(SMALLEST_CONTEXT - 3)[0].tolist()
    engine = LlamaCppEngine(opened[0], running=2)
    requests = [Request(tokens=tokens, sampling=Sampling(max_new_tokens=9)) for tokens in (ids, ids[:20])]
    answers = [answer.tokens for answer in engine.generate(requests)]
    assert answers == [stock_answer(stock[0], request.tokens, 9) for request in requests]


def test_scores_in_the_middle_of_an_answer_do_not_change_it(opened, stock):
    engine, ids = LlamaCppEngine(opened[0]), ids_of_length(50)[0].tolist()
    answer = []
    for event in engine.stream(Request(tokens=ids, sampling=Sampling(max_new_tokens=8))):
        answer.append(event.token)
        assert log_probs_of(engine, ids[:9]).shape[0] == 8
    assert answer == stock_answer(stock[0], ids, 8)


def test_a_cache_that_holds_no_request_is_refused(opened):
    engine = LlamaCppEngine(opened[0], cache_bytes=1000)
    needed = SMALLEST_CONTEXT * opened[0].cache_bytes_per_token
    with pytest.raises(UserError, match=f"too small for 13 tokens .* at least {needed:,} bytes"):
        engine.submit(Request(tokens=[1, 2, 3], sampling=Sampling(max_new_tokens=10)))
    assert LlamaCppEngine(opened[0], cache_bytes=needed).submit(Request(tokens=[1, 2, 3])) == 0


def test_ids_beyond_the_vocabulary_are_refused(opened):
    with pytest.raises(UserError, match=r"token id 99999; .*model\.gguf has ids from 0 to"):
        LlamaCppEngine(opened[0]).submit(Request(tokens=[1, 99999]))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_offsets_and_words_are_the_tokenizers_own(opened, stock, text):
    ours, theirs = (
        tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
        for tokenizer in (opened[1], stock[1])
    )
    assert all(list(ours[name]) == list(theirs[name]) for name in ("input_ids", "offset_mapping"))
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
    assert Engine(*opened).stops == set(ends)


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
    engine = Engine(*load(gguf_pair.file))
    engine.generate(["Say 3."], Sampling(max_new_tokens=2))
    gone = weakref.ref(engine.model)
    del engine
    gc.collect()
    assert gone() is None


def test_a_script_that_holds_a_file_at_its_end_ends_well(gguf_pair):
    script = (
        "import fettle\n"
        f"engine = fettle.Engine(*fettle.load({str(gguf_pair.file)!r}))\n"
        "print(len(engine.generate(['Say 3.', 'Say 4.'])))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr


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
