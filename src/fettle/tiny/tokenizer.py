"""The embedded model's tokenizer: byte-level BPE that separates words from spaces and punctuation.

Text is first split into runs of letters, single digits, and runs of anything else (spaces and punctuation);
BPE merges only within a run. A word is therefore the same token in a sentence, in quotes and in brackets, so
copying, the basis of most lessons, needs attention alone. The vocabulary contains every byte, so any text
survives encoding and decoding.

The role tokens and the chat template are Phi-3's; as in Phi-3's tokenizer, white space after a role token
belongs to the token.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CONTEXT_TOKENS = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' or message['role'] == 'user'"
    " or (message['role'] == 'system' and message['content']) %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer with at most `vocab_size` tokens on texts without role tokens.

    Raises ValueError if `vocab_size` is too small for the 256 bytes and the 5 special tokens.
    """
    role_tokens = [f"<|{role}|>" for role in ROLES] + [END_OF_TURN]
    special_tokens = [AddedToken(END_OF_TEXT, special=True, normalized=False)]
    special_tokens += [
        AddedToken(token, special=True, normalized=False, rstrip=True) for token in role_tokens
    ]
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {256 + len(special_tokens)} (bytes and special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    runs = Regex(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(runs, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
