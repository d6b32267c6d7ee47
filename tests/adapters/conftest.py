"""A small random model of every family, the same weights in stock transformers and here, and its folder."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fettle.models.decoder import causal_lm_class
from fettle.models.families import FAMILIES


@dataclass(frozen=True)
class Bases:
    """The base model twice; each test gets copies of its own."""

    stock: PreTrainedModel
    ours: PreTrainedModel


@functools.cache
def make_bases(family: str, layers: int = 2, hidden: int = 32) -> Bases:
    torch.manual_seed(0)
    config = FAMILIES[family].config(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    # transformers before 5.21 runs Gemma 2 by the fused attention, which leaves the soft cap out
    written_out = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
    stock = AutoModelForCausalLM.from_config(config, **written_out).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    stock.name_or_path = stock.config.name_or_path = "the-base"  # an adapter folder has to name it
    ours = causal_lm_class(family)(copy.deepcopy(config)).eval()
    ours.load_state_dict(stock.state_dict())
    return Bases(stock, ours)


@pytest.fixture
def bases_of() -> Callable[..., Bases]:
    """Fresh base models: `bases_of("phi3", layers=3)`."""
    return lambda *args, **kwargs: copy.deepcopy(make_bases(*args, **kwargs))


@pytest.fixture(params=FAMILIES)
def bases(request: pytest.FixtureRequest) -> Bases:
    """Every family."""
    return copy.deepcopy(make_bases(request.param))


@pytest.fixture
def phi3(bases_of: Callable[..., Bases]) -> Bases:
    return bases_of("phi3")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w96 and the three special tokens of the test models."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    rules = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def base_folder(phi3: Bases, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The Phi-3 base as a checkpoint folder, with its tokenizer."""
    folder = tmp_path / "base"
    phi3.stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def peft_adapted(stock: PreTrainedModel, **options: object) -> PeftModel:
    """Stock PEFT on a stock model; both adapter matrices random, as after training."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    adapted = get_peft_model(stock, LoraConfig(**settings | options))
    torch.manual_seed(7)
    randomise_adapter(adapted)
    return adapted


@torch.no_grad()
def randomise_adapter(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name and "magnitude" not in name:
            parameter.normal_(0, parameter.shape[-1] ** -0.5 / 2)
        elif ".lora_magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))


@pytest.fixture(name="peft_adapted")
def _peft_adapted() -> Callable[..., PeftModel]:
    """A function as above, for tests; they cannot import from here."""
    return peft_adapted


@pytest.fixture(name="randomise_adapter")
def _randomise_adapter() -> Callable[[PeftModel], None]:
    return randomise_adapter
