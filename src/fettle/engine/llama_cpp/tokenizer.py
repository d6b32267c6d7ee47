"""The tokenizer in a GGUF file, as llama.cpp runs it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.errors import UserError

Span = tuple[int, int]


class LlamaCppTokenizer:
    """A `Tokenizer` with the ids that llama.cpp gives."""

    is_fast = True  # it has offsets

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.name_or_path, self.chat_template = str(file.path), file.chat_template
        self.bos_token_id, self.eos_token_id = file.special("bos"), file.special("eos")
        self.special_tokens_map = {
            f"{role}_token": file.text_of(token)
            for role in ("bos", "eos", "pad")
            if (token := file.special(role)) is not None
        }
        self.bos_token = self.special_tokens_map.get("bos_token")
        self.eos_token = self.special_tokens_map.get("eos_token")

    def __len__(self) -> int:
        return self._file.vocab_size

    @cached_property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Tokens that are not ordinary text, by their ids."""
        return {
            token: AddedToken(self._file.text_of(token), special=self._file.is_control(token))
            for token in self._file.added_tokens()
        }

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Return the id of an added token; None for others."""
        return self._added_ids.get(tokens)

    def get_chat_template(self) -> Any:
        """Return the file's chat template."""
        return self.chat_template

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        """Return the ids of a text, or of each text of a list. Options: add_special_tokens, return_offsets_mapping."""
        if not isinstance(text, str):
            rows = [self(each, **options) for each in text]
            return {name: [row[name] for row in rows] for name in rows[0]} if rows else {"input_ids": []}
        ids = self._file.tokenize(text, add_special=options.get("add_special_tokens", True))
        encoded: dict[str, Any] = {"input_ids": ids}
        if options.get("return_offsets_mapping"):
            encoded["offset_mapping"] = offsets(text, [self._file.piece(token) for token in ids])
        return encoded

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """Return the text of ids. Other options of transformers' tokenizers have no effect."""
        return self._file.detokenize(token_ids, with_special=not skip_special_tokens)


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
