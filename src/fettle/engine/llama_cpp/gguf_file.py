"""An open GGUF file: its metadata and its vocabulary."""

import ctypes
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from fettle.checkpoints.locate import GGUF_MAGIC, gguf_magic_of
from fettle.engine.llama_cpp.gguf_header import read_header
from fettle.engine.llama_cpp.library import last_fault, library, log
from fettle.errors import UserError

LONGEST_METADATA = 4096
USUAL_PIECE_BYTES = 512

CONTROL, USER_DEFINED, UNKNOWN = 8, 16, 1
"""llama_token_attr: tokens that are not ordinary text."""


class Handles:
    """Addresses of llama.cpp's model and of its contexts, which must be freed before it."""

    def __init__(self, llama: ctypes.CDLL) -> None:
        self.llama = llama
        self.model: int | None = None
        self.contexts: set[int] = set()

    def free_context(self, context: int) -> None:
        if context in self.contexts:
            self.contexts.remove(context)
            self.llama.llama_free(context)

    def free(self) -> None:
        for context in list(self.contexts):
            self.free_context(context)
        if self.model:
            self.llama.llama_model_free(self.model)
        self.model = None


class GGUFFile:
    """A GGUF file that llama.cpp has opened. `LlamaCppEngine` runs it."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises UserError if it is not a GGUF file, is damaged, or has an architecture that cannot run."""
        require_gguf(path)
        header = read_header(path)
        if header.entries.get("general.type") == "adapter":
            raise UserError(
                f"{path} is a LoRA adapter without its base model: give the folder it was made from, or run it with a "
                f"GGUF file of its base: llama-server -m BASE.gguf --lora {path.name}."
            )
        self.path = path
        self._llama = library()
        log.clear()
        self.handles = Handles(self._llama)
        # finalize also runs at interpreter exit, while llama.cpp can still call back; `__del__` would be too late
        weakref.finalize(self, self.handles.free)
        self._model = self.handles.model = self._llama.llama_model_load_from_file(
            str(path).encode(), self._llama.llama_model_default_params()
        )
        if not self._model:
            raise UserError(f"{path} cannot be opened in llama.cpp: {last_fault()}.")
        if self._llama.llama_model_has_encoder(self._model) or not self._llama.llama_model_has_decoder(
            self._model
        ):
            raise UserError(f"{path} is not a text generation model (architecture {self.architecture}).")
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._llama.llama_vocab_n_tokens(self._vocabulary)
        self.context_length: int = self._llama.llama_model_n_ctx_train(self._model)
        original = self.metadata(f"{self.architecture}.rope.scaling.original_context_length")
        self.original_context = None if original is None else int(original)
        """Of a LongRoPE model: texts of more tokens use its long factors."""
        self._pieces: dict[int, bytes] = {}

    # --- metadata ------------------------------------------------------------------------------------------

    def metadata(self, name: str) -> str | None:
        """Return the entry of that name as text; None if the file has none."""
        buffer = ctypes.create_string_buffer(LONGEST_METADATA)
        length = self._llama.llama_model_meta_val_str(self._model, name.encode(), buffer, len(buffer))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    @property
    def architecture(self) -> str:
        return self.metadata("general.architecture") or "unknown"

    @property
    def chat_template(self) -> str | None:
        """Return the file's Jinja template, unchanged."""
        template: bytes | None = self._llama.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    # --- vocabulary ----------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Return the ids of `text`, parsing special tokens in it. add_special: add the file's own, such as BOS."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self._llama.llama_tokenize(
            self._vocabulary, data, len(data), ids, len(ids), add_special, True
        )
        if count < 0:
            raise UserError(f"{self.path}: llama.cpp cannot tokenize a text of {len(data):,} bytes.")
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int], *, with_special: bool) -> str:
        """Return the text of `ids`. with_special: special tokens are written out."""
        numbers = (ctypes.c_int32 * len(ids))(*ids)
        size = 16 * len(ids) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._llama.llama_detokenize(
                self._vocabulary, numbers, len(ids), buffer, size, False, with_special
            )
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", "replace")
            size = -length

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; special tokens give their text."""
        if token not in self._pieces:
            length = -USUAL_PIECE_BYTES
            while length < 0:  # minus the size that is needed
                size = -length
                buffer = ctypes.create_string_buffer(size)
                length = self._llama.llama_token_to_piece(self._vocabulary, token, buffer, size, 0, True)
            self._pieces[token] = buffer.raw[:length]
        return self._pieces[token]

    def text_of(self, token: int) -> str:
        """Return the token's text as stored in the file."""
        text: bytes = self._llama.llama_vocab_get_text(self._vocabulary, token)
        return text.decode("utf-8", "replace")

    def special(self, role: str) -> int | None:
        """Return the id of the token with the role `bos`, `eos` or `pad`; None if the file has none."""
        token: int = getattr(self._llama, f"llama_vocab_{role}")(self._vocabulary)
        return None if token < 0 else token

    def added_tokens(self) -> list[int]:
        """Return the ids of tokens that are not ordinary text."""
        kinds = CONTROL | USER_DEFINED | UNKNOWN
        attributes = self._llama.llama_vocab_get_attr
        return [token for token in range(self.vocab_size) if attributes(self._vocabulary, token) & kinds]

    def is_control(self, token: int) -> bool:
        return bool(self._llama.llama_vocab_get_attr(self._vocabulary, token) & CONTROL)

    def ends_answer(self, token: int) -> bool:
        """Whether llama.cpp stops at this token."""
        return bool(self._llama.llama_vocab_is_eog(self._vocabulary, token))

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens at which llama.cpp ends an answer."""
        return [token for token in self.added_tokens() if self.ends_answer(token)]

    @cached_property
    def cache_bytes_per_token(self) -> int:
        """Memory for a token's keys and values, in fp16."""
        heads = self._llama.llama_model_n_head_kv(self._model)
        usual = self._llama.llama_model_n_embd(self._model) // self._llama.llama_model_n_head(self._model)
        sizes = [
            int(self.metadata(f"{self.architecture}.attention.{kind}_length") or usual)
            for kind in ("key", "value")
        ]
        return int(2 * self._llama.llama_model_n_layer(self._model) * heads * sum(sizes))


def supports_gpu() -> bool:
    """Whether the installed llama.cpp can compute on a GPU, which it then does by default."""
    return bool(library().llama_supports_gpu_offload())


def require_gguf(path: Path) -> None:
    """Raise UserError unless the file begins with the GGUF magic; nothing else is read."""
    if (found := gguf_magic_of(path)) != GGUF_MAGIC:
        raise UserError(
            f"{path} is not a GGUF file: it begins with {found!r}, expected {GGUF_MAGIC!r}; fetch or export it again."
        )
