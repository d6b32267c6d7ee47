"""An open GGUF file: its metadata, its vocabulary, and a context that runs tokens.

llama.cpp allocates a KV cache of fixed size. Here it grows by doubling, so that a short answer from a model with a
context of 131,072 tokens does not take 50 GB. It exceeds the original context of a LongRoPE model only if the text
does, as llama.cpp uses the long factors for every position once the cache is larger.
"""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fettle.checkpoints.locate import GGUF_MAGIC, gguf_magic_of
from fettle.engine.llama_cpp.gguf_header import read_header
from fettle.engine.llama_cpp.library import Batch, last_fault, library, log
from fettle.errors import UserError

CHUNK_TOKENS = 512
"""Tokens per batch, llama.cpp's default n_ubatch; also the number of logits rows held at once."""

CONTEXT_STEP = 256
"""Tokens; llama.cpp rounds the size of its KV cache up to a multiple of it."""

SMALLEST_CONTEXT = 1024
LONGEST_METADATA = 4096
USUAL_PIECE_BYTES = 512

CONTROL, USER_DEFINED, UNKNOWN = 8, 16, 1
"""llama_token_attr: tokens that are not ordinary text."""


class _HeldOpen:
    """Addresses of llama.cpp's model and context; the context must be freed before its model."""

    def __init__(self) -> None:
        self.model: int | None = None
        self.context: int | None = None

    def close_context(self, llama: ctypes.CDLL) -> None:
        if self.context:
            llama.llama_free(self.context)
        self.context = None

    def close(self, llama: ctypes.CDLL) -> None:
        self.close_context(llama)
        if self.model:
            llama.llama_model_free(self.model)
        self.model = None


class GGUFFile:
    """A GGUF file that llama.cpp has opened."""

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
        self._held_open = _HeldOpen()
        # finalize also runs at interpreter exit, while llama.cpp can still call back; `__del__` would be too late
        weakref.finalize(self, self._held_open.close, self._llama)
        self._model = self._held_open.model = self._llama.llama_model_load_from_file(
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
        self._original_context = None if original is None else int(original)
        self._held: list[int] = []
        self._capacity = 0
        self._pieces: dict[int, bytes] = {}

    @property
    def _context(self) -> int | None:
        return self._held_open.context

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

    # --- running -------------------------------------------------------------------------------------------

    def next_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after `ids`, fp32 (vocabulary,). A prefix shared with the last call is not run again."""
        shared = common_length(self._held, ids[:-1])
        self._ensure_capacity(len(ids), shared)
        logits = torch.empty(0)
        for start in range(len(self._held), len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            logits = self._run(chunk, [len(chunk) - 1])
        return logits[0].clone()

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the logits at `positions` of `ids` (ascending), chunk by chunk, fp32 (positions, vocabulary).

        Each chunk is a view of llama.cpp's memory: it must be used or copied before the next.
        """
        self._ensure_capacity(len(ids), shared=0)
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            inside = [position - start for position in positions if 0 <= position - start < len(chunk)]
            yield self._run(chunk, inside)

    def _run(self, ids: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
        """Run `ids` after the cached tokens; return the logits at `wanted`, a view (wanted, vocabulary)."""
        tokens = np.array(ids, dtype=np.int32)
        flags = np.zeros(len(ids), dtype=np.int8)
        flags[list(wanted)] = 1
        batch = Batch(n_tokens=len(ids))
        batch.token = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.logits = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        if self._llama.llama_decode(self._context, batch) != 0:
            self._held = []
            raise UserError(f"{self.path} cannot be run in llama.cpp: {last_fault()}.")
        self._held += ids
        if not wanted:
            return torch.empty(0, self.vocab_size)
        found = self._llama.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (len(wanted), self.vocab_size)))

    def _ensure_capacity(self, tokens: int, shared: int) -> None:
        """Make a KV cache for `tokens` that keeps the first `shared` cached tokens, or none if it is reallocated."""
        if tokens > self._capacity or self._is_long(tokens) != self._is_long(self._capacity):
            self._new_context(self._capacity_for(tokens))
            return
        memory = self._llama.llama_get_memory(self._context)
        if shared and self._llama.llama_memory_seq_rm(memory, 0, shared, -1):
            self._held = self._held[:shared]
        else:
            self._llama.llama_memory_clear(memory, True)
            self._held = []

    def _is_long(self, tokens: int) -> bool:
        """Whether that many tokens need LongRoPE's long factors."""
        return self._original_context is not None and tokens > self._original_context

    def _capacity_for(self, tokens: int) -> int:
        capacity = SMALLEST_CONTEXT
        while capacity < tokens:
            capacity *= 2
        if self._original_context is not None and tokens <= self._original_context:
            # llama.cpp rounds the size up, and beyond the original context would use the long factors
            within = self._original_context // CONTEXT_STEP * CONTEXT_STEP
            return min(capacity, within) if tokens <= within else self._original_context
        return capacity

    def _new_context(self, capacity: int) -> None:
        self._held_open.close_context(self._llama)
        parameters = self._llama.llama_context_default_params()
        parameters.sizes[0], parameters.sizes[1], parameters.sizes[2] = capacity, CHUNK_TOKENS, CHUNK_TOKENS
        log.clear()
        self._held_open.context, self._held = self._llama.llama_init_from_model(self._model, parameters), []
        if not self._context:
            self._capacity = 0
            raise UserError(
                f"{self.path} cannot be run in llama.cpp with {capacity:,} tokens: {last_fault()}."
            )
        self._capacity = capacity
        self._llama.llama_set_n_threads(self._context, torch.get_num_threads(), torch.get_num_threads())


def supports_gpu() -> bool:
    """Whether the installed llama.cpp can compute on a GPU, which it then does by default."""
    return bool(library().llama_supports_gpu_offload())


def require_gguf(path: Path) -> None:
    """Raise UserError unless the file begins with the GGUF magic; nothing else is read."""
    if (found := gguf_magic_of(path)) != GGUF_MAGIC:
        raise UserError(
            f"{path} is not a GGUF file: it begins with {found!r}, expected {GGUF_MAGIC!r}; fetch or export it again."
        )


def common_length(held: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    count = 0
    for ours, theirs in zip(held, ids, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
