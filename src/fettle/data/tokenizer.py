"""What fettle asks of a tokenizer: transformers' tokenizers have it, and so has the vocabulary of a GGUF file."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary


class Tokenizer(Protocol):
    """Text to ids and back, as in transformers' `PreTrainedTokenizerBase`."""

    name_or_path: str
    chat_template: Any
    bos_token: Any
    eos_token: Any
    bos_token_id: Any
    eos_token_id: Any

    @property
    def is_fast(self) -> bool:
        """Whether it can return offsets, the characters of each token."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens that are not ordinary text, by their ids; `special` is a flag of each."""

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The texts of special tokens by their roles, such as `bos_token`."""

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Return `input_ids`, and `offset_mapping` if `return_offsets_mapping` is given."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def get_chat_template(self) -> str: ...


Key = TypeVar("Key")
Value = TypeVar("Value")


def cached(function: Callable[[Tokenizer, Key], Value]) -> Callable[[Tokenizer, Key], Value]:
    """Keep the last result for each tokenizer, but not the tokenizer: that of a GGUF file holds the opened model."""
    results: WeakKeyDictionary[Tokenizer, tuple[Key, Value]] = WeakKeyDictionary()

    @wraps(function)
    def wrapper(tokenizer: Tokenizer, key: Key) -> Value:
        if tokenizer not in results or results[tokenizer][0] != key:
            results[tokenizer] = key, function(tokenizer, key)
        return results[tokenizer][1]

    return wrapper
