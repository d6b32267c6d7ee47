"""llama.cpp's tokenizer with the interface of a transformers tokenizer: the same ids as in llama.cpp."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizerBase

from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.errors import UserError

Span = tuple[int, int]


class LlamaCppTokenizer(PreTrainedTokenizerBase):
    """The part of the tokenizer interface that fettle uses; without padding and truncation."""

    is_fast = True  # it supports offsets

    def __init__(self, file: GGUFFile) -> None:
        roles = {role: file.special(role) for role in ("bos", "eos", "pad")}
        named = {f"{role}_token": file.text_of(token) for role, token in roles.items() if token is not None}
        super().__init__(chat_template=file.chat_template, name_or_path=str(file.path), **named)
        self._file = file

    def __len__(self) -> int:
        return self._file.vocab_size

    @property
    def vocab_size(self) -> int:
        return self._file.vocab_size

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Return tokens that are not ordinary text, by their ids."""
        return {
            token: AddedToken(self._file.text_of(token), special=self._file.is_control(token))
            for token in self._file.added_tokens()
        }

    def stop_ids(self) -> list[int]:
        """Return the tokens at which llama.cpp ends an answer."""
        return [token for token in self.added_tokens_decoder if self._file.ends_answer(token)]

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return {str(token): index for index, token in self.added_tokens_decoder.items()}

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of an added token, or those of several; None for others."""
        if isinstance(tokens, str):
            return self._added_ids.get(tokens)
        return [self._added_ids.get(token) for token in tokens]

    def _encode_plus(  # type: ignore[no-untyped-def]  # the many arguments of the class above
        self, text, text_pair=None, add_special_tokens=True, return_tensors=None, **kwargs
    ) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        rows = [self._file.tokenize(words, add_special=add_special_tokens) for words in texts]
        encoded: dict[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
        if kwargs.get("return_offsets_mapping"):
            encoded["offset_mapping"] = [
                offsets(words, [self._file.piece(token) for token in ids])
                for words, ids in zip(texts, rows, strict=True)
            ]
        if isinstance(text, str) and return_tensors is None:
            encoded = {name: values[0] for name, values in encoded.items()}
        return BatchEncoding(encoded, tensor_type=return_tensors)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._file.detokenize(ids, with_special=not skip_special_tokens)


def offsets(text: str, pieces: Sequence[bytes]) -> list[Span]:
    """Return the characters of `text` that each token covers, as (start, end), from the bytes of the tokens.

    A space that the tokenizer adds before a word is not part of the text; if it is a separate token, it covers the
    character that follows, as in `tokenizers`. A special token that was added covers nothing. White space that a
    special token strips belongs to that token. Raises UserError if text and tokens do not match.
    """
    data = text.encode()
    spans: list[Span] = []
    position, last = 0, -1  # last: the token to which stripped white space belongs
    for number, piece in enumerate(pieces):
        end = _end(data, position, piece)
        if end is None:
            after = len(data) - len(data[position:].lstrip())
            end = _end(data, after, piece)
            if end is None:  # a token that the tokenizer adds
                end = position
            else:
                if last >= 0:
                    spans[last] = (spans[last][0], after)
                position = after
        spans.append((position, end))
        last = last if _is_added_space(piece, spans[number]) else number
        position = end
    if data[position:].strip() or (data and not spans):
        raise UserError("llama.cpp's tokens cannot be aligned with this text; remove the row.")
    if position < len(data):
        spans[last] = (spans[last][0], len(data))
    for number, (piece, following) in enumerate(zip(pieces, spans[1:], strict=False)):
        if _is_added_space(piece, spans[number]):
            spans[number] = (following[0], min(following[0] + 1, len(data)))
    return _in_characters(data, spans)


def _is_added_space(piece: bytes, span: Span) -> bool:
    return piece == b" " and span[0] == span[1]


def _end(data: bytes, position: int, piece: bytes) -> int | None:
    """Return where `piece` ends in `data` if it is at `position`, possibly without its leading space; else None."""
    for variant in (piece, piece.removeprefix(b" ")):
        if data.startswith(variant, position):
            return position + len(variant)
    return None


def _in_characters(data: bytes, spans: Sequence[Span]) -> list[Span]:
    """Convert spans of bytes to spans of characters; a token that covers part of a character gets all of it."""
    index, character_of = -1, []
    for byte in data:
        index += byte & 0xC0 != 0x80  # a byte that begins a character
        character_of.append(index)
    character_of.append(index + 1)
    return [
        (character_of[start], character_of[end - 1] + 1 if end > start else character_of[start])
        for start, end in spans
    ]
