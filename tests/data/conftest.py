"""Small tokenizers of our own, one for each way in which chat templates differ."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

WORDS = (
    "Hello there! How are you today? I am fine, thank you. The sum of two and two is 4.\n"
    "Be brief and kind. What is the capital of France? It is Paris.\n\n```python\nprint(1)\n```\n"
    " naïve café\n"
)

# name -> (the template, its tokens, the end of an answer)
TEMPLATES = {
    # Tokens that swallow the white space after them, and an end-of-text token after the last turn.
    "phi": (
        "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
    ),
    # Trims, calls the assistant "model", refuses a system turn and turns that do not alternate.
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{{ '<start>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] | trim + '<stop>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}",
        ["<start>", "<stop>"],
        "<stop>",
    ),
    # Trims, and writes a system turn of its own where there is none.
    "llama": (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
        "{{ '<|head|>system<|tail|>\n\nToday is Monday<|eot|>' }}{% endif %}{% for m in messages %}"
        "{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}",
        ["<|head|>", "<|tail|>", "<|eot|>"],
        "<|eot|>",
    ),
    # A space between the tag and the answer; the system text moves into the last turn, if that is the user's.
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
        "{% for m in rest %}{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
        "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
        "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}"
        "{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
        "</s>",
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    # Role tags of plain text, and the end-of-text token as the end of a turn.
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        [],
        "</s>",
    ),
    # White space between the answer and the token that ends it; everything between brackets is plain text.
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim }}"
        "{{ ' [/INST]' }}{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
        "{% else %}"
        "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        [],
        "</s>",
    ),
    # Removes the thoughts of earlier answers and opens the last one with a (here empty) block of thoughts.
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set words = m['content'] %}"
        "{% if m['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in words %}"
        "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.last %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}{{ words + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
}


@dataclass
class Family:
    """A tokenizer with the chat template it is named for."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    end: str

    def answer(self, words: str) -> str:
        """The words as the template writes them after a generation prompt, to the end of the turn."""
        lead = " " if self.name in ("mistral", "llama2") else ""
        return lead + words + (" " if self.name == "llama2" else "") + self.end


def train_tokenizer(is_byte_level: bool, role_tokens: list[str], rstrip: bool = False) -> Tokenizer:
    """A BPE of a few hundred pieces, byte-level (Llama 3, Qwen) or with word marks (Phi-3, Mistral)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=not is_byte_level, unk_token="<unk>"))
    specials = ["<unk>", "<s>", "</s>"]
    if is_byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
        )
        alphabet = []
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, special=True) for token in role_tokens])
    return tokenizer


def make_family(name: str) -> Family:
    template, role_tokens, end = TEMPLATES[name]
    is_byte_level = name not in ("phi", "mistral", "zephyr")
    raw = train_tokenizer(is_byte_level, role_tokens, rstrip=name == "phi")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    return Family(name, tokenizer, end)


@pytest.fixture(scope="session", params=list(TEMPLATES))
def family(request: pytest.FixtureRequest) -> Family:
    """Each of the tokenizers with a template in turn."""
    return make_family(request.param)


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    """All tokenizers with a template, by name."""
    return {name: make_family(name) for name in TEMPLATES}


@pytest.fixture
def base() -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template that starts every text with `<s>`, as Llama's base models do."""
    raw = train_tokenizer(is_byte_level=True, role_tokens=[])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHECKPOINTS = {
    "Phi-3.5-mini-instruct": "<|end|>",
    "Llama-3.1-8B-Instruct": "<|eot_id|>",
    "Mistral-7B-Instruct-v0.3": "</s>",
    "gemma-2-9b-it": "<end_of_turn>",
    "TinyLlama-1.1B-Chat-v1.0": "</s>",
    "zephyr-7b-beta": "</s>",
}
"""Real tokenizers, and the token that ends an answer."""


@cache
def _tokenizer_at(path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(params=list(CHECKPOINTS))
def tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of each real checkpoint in turn."""
    return _tokenizer_at(shared_data / "checkpoints" / request.param)


@pytest.fixture
def end(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that ends an answer of the real checkpoint."""
    return CHECKPOINTS[Path(tokenizer.name_or_path).name]
