"""The tokenizer's entries in a GGUF file, derived from tokenizer.json alone.

The families here use two of llama.cpp's tokenizers:

- "llama" (SentencePiece): characters are merged pairwise, the pair with the best score first; characters outside the
  vocabulary fall back to bytes. tokenizer.json has ranked merges instead of scores, so a piece's score is minus the
  rank of the first merge that yields it. A space is written as ▁.
- "gpt2" (byte-level BPE): text is first split by a regular expression, which GGUF refers to by name.

fettle-tiny is byte-level with a regular expression that llama.cpp does not support. It is stored as "llama", which is
equivalent for it: its pieces are whole characters, none spans a split, and scores order the merges.
"""

import json
import re
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from fettle.data import generation_prompt
from fettle.errors import UserError

SPACE = "▁"
UNREACHABLE = -1e9
"""Score of a piece that no merge yields."""

STRIPPING_NAME = "phi-3"
"""llama.cpp strips white space after special tokens in models whose name contains this."""

STRIPPING_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
"""Tokens that it then looks up; it refuses a file that lacks one."""

BYTES_NOT_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))

# llama.cpp's names of the splits before byte-level BPE, by regular expression.
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}

RUNS = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
"""fettle-tiny's split, which SentencePiece does not need: no piece spans two such runs, so they are never merged."""


def tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: list[int] | None = None
) -> dict[str, Any]:
    """Return the entries under `tokenizer.`: pieces, scores or merges, types, special ids, chat template.

    vocab_size: rows of the embedding; ids beyond the tokenizer's get placeholders. stop_ids: tokens that end an answer.
    Raises UserError for a tokenizer that GGUF cannot express.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"A tokenizer of type {model['type']} cannot be exported as GGUF; expected BPE.")
    if model.get("byte_fallback"):
        fields = _sentencepiece(content, vocab_size)
    elif (pre := PRE_TOKENIZERS.get(_pattern(content))) is not None:
        fields = _byte_level(content, vocab_size, pre)
    elif _pattern(content) == RUNS:
        fields = _sentencepiece(_as_characters(content), vocab_size)
    else:
        raise UserError(
            f"This tokenizer splits text by a pattern that llama.cpp does not support ({_pattern(content)!r}): "
            "it cannot be exported as GGUF."
        )
    if _strips(content):
        _lend(fields)
    return {**fields, **_special_ids(tokenizer, content, stop_ids or [])}


def name_for(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Return the model's name, changed if necessary so that llama.cpp strips white space after special tokens exactly
    if the tokenizer does."""
    strips = _strips(json.loads(tokenizer.backend_tokenizer.to_str()))
    is_marked = re.search("phi-?3", name, re.IGNORECASE)
    if strips and not is_marked:
        return f"{name} ({STRIPPING_NAME})"
    return name if strips else re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def _strips(content: dict[str, Any]) -> bool:
    """Whether special tokens strip the white space after them."""
    return any(token["rstrip"] and token["special"] for token in content["added_tokens"])


def _lend(fields: dict[str, Any]) -> None:
    """Add the tokens that llama.cpp looks up for STRIPPING_NAME, in place of bytes that do not occur in UTF-8."""
    pieces, kinds = fields["ggml.tokens"], fields["ggml.token_type"]
    free = [pieces.index(f"<0x{byte:02X}>") for byte in BYTES_NOT_IN_UTF8 if f"<0x{byte:02X}>" in pieces]
    absent = [token for token in STRIPPING_TOKENS if token not in pieces]
    if len(absent) > len(free):
        raise UserError(
            "llama.cpp can strip white space after special tokens, as this tokenizer does, only if the vocabulary "
            f"has {' '.join(STRIPPING_TOKENS)}; it lacks {' '.join(absent)}."
        )
    for token, index in zip(absent, free, strict=False):
        pieces[index], kinds[index] = token, int(TokenType.UNUSED)


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return merges as pairs; older files store a pair as one string with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _pieces(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return every id's text and GGUF type."""
    pieces = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    vocabulary = content["model"]["vocab"]
    added = {token["content"]: token for token in content["added_tokens"]}
    for piece, index in vocabulary.items() | {(piece, token["id"]) for piece, token in added.items()}:
        if index >= vocab_size:
            raise UserError(
                f"The tokenizer's id {index} ({piece!r}) is beyond the model's {vocab_size} embeddings."
            )
        pieces[index] = piece
        kinds[index] = TokenType.BYTE if _is_byte(piece) else TokenType.NORMAL
        if piece in added:
            kinds[index] = TokenType.CONTROL if added[piece]["special"] else TokenType.USER_DEFINED
            if not added[piece]["special"]:
                pieces[index] = piece.replace(SPACE, " ")
        if piece == content["model"].get("unk_token"):
            kinds[index] = TokenType.UNKNOWN
    return pieces, [int(kind) for kind in kinds]


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _sentencepiece(content: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    pieces, kinds = _pieces(content, vocab_size)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(content["model"])):
        ranks.setdefault(left + right, rank)
    scores = [
        float(-ranks[piece]) if piece in ranks else UNREACHABLE if kind == TokenType.NORMAL else 0.0
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": pieces,
        "ggml.scores": scores,
        "ggml.token_type": kinds,
        "ggml.add_space_prefix": _adds_space(content),
    }


def _byte_level(content: dict[str, Any], vocab_size: int, pre: str) -> dict[str, Any]:
    pieces, kinds = _pieces(content, vocab_size)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": pieces,
        "ggml.token_type": kinds,
        "ggml.merges": [f"{left} {right}" for left, right in _merges(content["model"])],
    }


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a text gets a space before its first word."""
    normalizer, cut = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = [normalizer, *normalizer.get("normalizers", [])]
    prepends = any(step.get("type") == "Prepend" for step in steps)
    return prepends or (cut.get("type") == "Metaspace" and cut.get("prepend_scheme") != "never")


def _template(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> str | None:
    """Return the chat template, changed so that llama.cpp tokenizes rendered chats as the tokenizer does.

    llama.cpp inserts a space before a text's first word and after every special token. For a tokenizer that does so
    only before the first word (Mistral's), templates write that space themselves, as in "[INST] " + question or
    " " + answer; it is removed here.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None  # the default of several
    if template and (content.get("pre_tokenizer") or {}).get("prepend_scheme") == "first":
        for token in content["added_tokens"]:
            if token["special"]:
                template = template.replace(f"{token['content']} ", token["content"])
        template = re.sub(r"""(\{\{-?\s*)(["']) \2\s*\+\s*""", r"\1", template)
    return template


def _pattern(content: dict[str, Any]) -> str:
    """Return the regular expression that splits text before byte-level BPE; "" if there is none."""
    cut = content.get("pre_tokenizer") or {}
    for step in [cut, *cut.get("pretokenizers", [])]:
        if step.get("type") == "Split":
            return str(step["pattern"].get("Regex", ""))
    return ""


def byte_of_character() -> dict[str, int]:
    """Return the byte of each of the 256 characters of byte-level BPE (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def _as_characters(content: dict[str, Any]) -> dict[str, Any]:
    """Convert a byte-level vocabulary to characters, with single bytes beyond ASCII as <0x..>."""
    table, added = byte_of_character(), {token["content"] for token in content["added_tokens"]}

    def plain(piece: str) -> str:
        if piece in added:
            return piece
        data = bytes(table[character] for character in piece)
        if len(data) == 1 and not 0 < data[0] < 128:
            return f"<0x{data[0]:02X}>"
        if not data.isascii():
            raise UserError(
                f"This tokenizer merges bytes beyond ASCII after a split that llama.cpp does not support ({RUNS!r}): "
                "it cannot be exported as GGUF."
            )
        return data.decode().replace(" ", SPACE)

    model = content["model"]
    return content | {
        "model": model
        | {
            "vocab": {plain(piece): index for piece, index in model["vocab"].items()},
            "merges": [(plain(left), plain(right)) for left, right in _merges(model)],
        }
    }


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], stop_ids: list[int]
) -> dict[str, Any]:
    """Return the ids of special roles, which tokens llama.cpp adds by itself, and the chat template."""
    template = _template(tokenizer, content)
    fields: dict[str, Any] = {
        "ggml.bos_token_id": tokenizer.bos_token_id,
        "ggml.eos_token_id": tokenizer.eos_token_id,
        "ggml.unknown_token_id": tokenizer.unk_token_id,
        "ggml.padding_token_id": tokenizer.pad_token_id,
        "ggml.eot_token_id": _end_of_turn(tokenizer, template, stop_ids),
        "chat_template": template,
    }
    begins, ends = _added(content)
    if template and begins and not template_begins(tokenizer):
        begins = False  # chats are trained as the template renders them; llama.cpp would add the token
    fields |= {"ggml.add_bos_token": begins, "ggml.add_eos_token": ends}
    return {name: value for name, value in fields.items() if value is not None}


def template_begins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat in the tokenizer's template begins with the beginning-of-text token."""
    try:
        return generation_prompt(tokenizer, [{"role": "user", "content": "x"}]).startswith(
            tokenizer.bos_token or ""
        )
    except UserError:  # a template that refuses this chat
        return True


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str | None, stop_ids: list[int]) -> int | None:
    """Return the stop token other than eos that the chat template writes; None if there is none."""
    for index in stop_ids:
        text = tokenizer.convert_ids_to_tokens(index)
        if index != tokenizer.eos_token_id and text and text in (template or ""):
            return index
    return None


def _added(content: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the tokenizer adds a special token before a text, and one after it."""
    processor = content.get("post_processor") or {}
    for step in [processor, *processor.get("processors", [])]:
        if step.get("type") == "TemplateProcessing":
            return "SpecialToken" in step["single"][0], "SpecialToken" in step["single"][-1]
    return False, False
