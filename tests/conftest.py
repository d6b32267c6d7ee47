"""What every test stands on: no network, no telemetry, no shared caches, one thread, quick tests first."""

import atexit
import contextlib
import gc
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# These are read when the libraries are imported, so they come before any such import; commands that tests
# start inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # torch's threads: the tests run on as many workers as there are cores
)

# Caches of our own, so that no test finds a model, or the speed of a device, that only this machine has. Workers share
# the first's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    for cache in ("HF_HOME", "XDG_CACHE_HOME"):
        os.environ[cache] = tempfile.mkdtemp(prefix="fettle-tests-")
        atexit.register(shutil.rmtree, os.environ[cache], ignore_errors=True)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, configurations and rows; a clone without them skips the tests that ask for them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real checkpoints and rows of ../shared/data, which are not here")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: a mistake shows early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection_finish() -> None:
    """Leave the libraries' millions of objects out of garbage collection: a run collects several times, 0.5 s each."""
    gc.collect()
    gc.freeze()


# ---- a very small checkpoint, rows for it, and the command line --------------------------------------------

WORDS = (
    "Say {n}. Here is {n}! What is the capital of France? It is Paris. Be brief, please.",
    "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.",
)


class Ended(NamedTuple):
    """How a command ended: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ended]:
    """The command line in this process: `cli("generate", "--model", folder, stdin="...")`."""
    from fettle.cli import main

    def run(*words: object, stdin: str | io.TextIOBase = "") -> Ended:
        out, err = io.StringIO(), io.StringIO()
        given = mock.patch.object(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), given:
            try:
                code = main([str(word) for word in words])
            except SystemExit as end:  # what argparse does with a mistake
                code = int(end.code or 0)
        return Ended(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: Phi-3 with 2 layers of 32, random weights, a tokenizer with Phi-3's roles."""
    import torch
    from transformers import GenerationConfig, Phi3Config

    from fettle.models.decoder import causal_lm_class
    from fettle.models.save import save_model
    from fettle.tiny.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([text.format(n=n) for n in range(9) for text in WORDS], 400)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = causal_lm_class("phi3")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger than a new model's, so that answers hang on every part of it
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    folder = tmp_path_factory.mktemp("models") / "small"
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows that are easy to learn: `Say 7.` -> `Here is 7!`"""
    file = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    with file.open("w") as lines:
        for n in range(24):
            turns = [("user", f"Say {n}."), ("assistant", f"Here is {n}!")]
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    cli: Callable[..., Ended],
    small_model: Path,
    chats: Path,
) -> Path:
    """What `fettle train` leaves of 30 steps on `chats`."""
    output = tmp_path_factory.mktemp("trained") / "run"
    ended = cli(
        *("train", "--model", small_model, "--data", chats, "--output", output),
        *("--max-steps", 30, "--learning-rate", 0.02, "--save-steps", 10, "--device", "cpu"),
    )
    assert ended.code == 0, ended.err
    return output


# ---- the same small model as a checkpoint folder and as a GGUF file -----------------------------------------

GGUF_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How llama.cpp cuts text before byte-level BPE under the name qwen2."""


class GGUFPair(NamedTuple):
    """One model twice: a checkpoint folder in fp32 and a GGUF file whose matrices are in fp16."""

    folder: Path
    file: Path


@pytest.fixture(scope="session")
def gguf_pair(tmp_path_factory: pytest.TempPathFactory) -> GGUFPair:
    """Qwen2 with 2 layers of 64 and random weights that fp16 holds without rounding."""
    import torch
    from transformers import GenerationConfig, Qwen2Config

    from fettle.models.decoder import causal_lm_class
    from fettle.models.save import save_model

    tokenizer = _qwen2_tokenizer()
    special = {f"{role}_token_id": 0 for role in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **(sizes | heads | special),
    )
    torch.manual_seed(0)
    model = causal_lm_class("qwen2")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
            parameter.copy_(parameter.half())
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    pair = GGUFPair(folder := tmp_path_factory.mktemp("gguf") / "model", folder.with_name("model.gguf"))
    save_model(model, tokenizer, pair.folder)
    _write_gguf(model, tokenizer, pair.file)
    return pair


def _qwen2_tokenizer() -> "PreTrainedTokenizerFast":
    """Phi-3's roles on byte-level BPE that both libraries cut alike."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fettle.tiny.tokenizer import train_tokenizer

    trained = train_tokenizer([text.format(n=n) for n in range(9) for text in WORDS], 400)
    content = json.loads(trained.backend_tokenizer.to_str())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": GGUF_CUT}
    for token in content["added_tokens"]:
        token["rstrip"] = False
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=trained.chat_template,
        **{f"{role}_token": trained.eos_token for role in ("bos", "eos", "pad")},
    )


def _write_gguf(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", path: Path) -> None:
    from fettle.export.gguf import write_gguf

    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    write_gguf(model.state_dict().items(), model.config, tokenizer, {"f16": path}, stop_ids=stops)
