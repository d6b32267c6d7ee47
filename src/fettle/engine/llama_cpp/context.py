"""A context of llama.cpp: the keys and values of several sequences, and the run of new tokens.

llama.cpp allocates them at a fixed size, so a context is made for as many tokens as are needed, not for the model's
whole context of perhaps 131,072 tokens. A LongRoPE model uses its long factors for every position once the context is
larger than its original one, so a context is either short or long, and runs only texts of its kind.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fettle.engine.llama_cpp.gguf_file import GGUFFile
from fettle.engine.llama_cpp.library import Batch, last_fault, library, log
from fettle.errors import UserError

BATCH_TOKENS = 512
"""New tokens per run, llama.cpp's default n_ubatch; also the number of logits rows held at once."""

CONTEXT_STEP = 256
"""Tokens; llama.cpp rounds the size of a context up to a multiple of it."""

SMALLEST_CONTEXT = 1024


class Part(NamedTuple):
    """New tokens of one sequence. wanted: which of them the logits are needed at, ascending."""

    sequence: int
    tokens: Sequence[int]
    wanted: Sequence[int]


class Context:
    """Holds `sequences` sequences of at most `tokens` tokens. held: the tokens that each has keys and values of."""

    def __init__(self, file: GGUFFile, tokens: int, sequences: int) -> None:
        """Raises UserError if llama.cpp cannot allocate it."""
        self.file, self.tokens = file, tokens
        self.held: list[list[int]] = [[] for _ in range(sequences)]
        self._llama = library()
        parameters = self._llama.llama_context_default_params()
        parameters.sizes[:] = [tokens * sequences, BATCH_TOKENS, BATCH_TOKENS, sequences]
        log.clear()
        address = self._llama.llama_init_from_model(file.handles.model, parameters)
        if not address:
            raise UserError(f"{file.path} cannot be run in llama.cpp with {tokens:,} tokens: {last_fault()}.")
        self.address: int = address
        file.handles.contexts.add(address)
        self.close = weakref.finalize(self, file.handles.free_context, address)
        threads = torch.get_num_threads()
        self._llama.llama_set_n_threads(address, threads, threads)
        self._memory = self._llama.llama_get_memory(address)

    def fits(self, tokens: int) -> bool:
        """Whether it can run a text of that many tokens, with the factors for that length."""
        return tokens <= self.tokens and is_long(self.file, tokens) == is_long(self.file, self.tokens)

    def keep(self, sequence: int, tokens: int) -> None:
        """Forget what a sequence holds after its first tokens."""
        if tokens == len(self.held[sequence]):
            return
        if tokens and self._llama.llama_memory_seq_rm(self._memory, sequence, tokens, -1):
            del self.held[sequence][tokens:]
        else:  # always possible
            self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self.held[sequence] = []

    def copy(self, source: int, target: int) -> None:
        """Make a sequence hold what another one holds."""
        self.keep(target, 0)
        self._llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.held[target] = list(self.held[source])

    def run(self, parts: Sequence[Part]) -> torch.Tensor:
        """Run new tokens, at most BATCH_TOKENS; return the logits at the wanted ones, fp32 (wanted, vocabulary).

        They are a view of llama.cpp's memory: use or copy them before the next run.
        """
        tokens = np.array([token for part in parts for token in part.tokens], dtype=np.int32)
        owners = np.array([part.sequence for part in parts for _ in part.tokens], dtype=np.int32)
        flags = np.concatenate([np.zeros(len(part.tokens), dtype=np.int8) for part in parts])
        first = 0
        for part in parts:
            flags[[first + index for index in part.wanted]] = 1
            first += len(part.tokens)
        counts = np.ones(len(tokens), dtype=np.int32)
        number = ctypes.POINTER(ctypes.c_int32)
        lists = (number * len(tokens))(
            *(ctypes.cast(owners.ctypes.data + 4 * row, number) for row in range(len(tokens)))
        )
        batch = Batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(number),
            n_seq_id=counts.ctypes.data_as(number),
            seq_id=lists,
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        log.clear()
        if self._llama.llama_decode(self.address, batch) != 0:
            for sequence in range(len(self.held)):
                self.keep(sequence, 0)
            raise UserError(f"{self.file.path} cannot be run in llama.cpp: {last_fault()}.")
        for part in parts:
            self.held[part.sequence] += part.tokens
        rows = int(flags.sum())
        if not rows:
            return torch.empty(0, self.file.vocab_size)
        found = self._llama.llama_get_logits(self.address)
        return torch.from_numpy(np.ctypeslib.as_array(found, (rows, self.file.vocab_size)))


def is_long(file: GGUFFile, tokens: int) -> bool:
    """Whether a text of that many tokens needs LongRoPE's long factors."""
    return file.original_context is not None and tokens > file.original_context


def context_tokens_for(file: GGUFFile, tokens: int) -> int:
    """Return the size of a context for texts of up to that many tokens."""
    size = SMALLEST_CONTEXT
    while size < tokens:
        size *= 2
    if file.original_context is not None and tokens <= file.original_context:
        # llama.cpp rounds the size up, and beyond the original context would use the long factors
        within = file.original_context // CONTEXT_STEP * CONTEXT_STEP
        return min(size, within) if tokens <= within else file.original_context
    return size


def common_length(held: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    count = 0
    for ours, theirs in zip(held, tokens, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
