"""Texts as numbers, one per word, and the hashes of their n-grams: what rows are compared by.

A word is a run of letters and digits in lower case, so case and punctuation make no difference.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

_WORD = re.compile(r"\w+")
_CHUNK_WORDS = 1 << 16
"""Words hashed at a time: their hashes fit a processor's cache."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of numbered words, one after the other: text i is `words[starts[i] : starts[i + 1]]`."""

    words: npt.NDArray[np.uint32]
    starts: Indices

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Indices:
        """Words of each text."""
        return np.diff(self.starts)

    def ngrams(self, n: int, first: int, last: int) -> tuple[Hashes, Indices]:
        """Return the hashes of the n-grams of texts `first` to before `last`, and the place in `words` of each."""
        a, b = self.starts[first], self.starts[last]
        places = np.arange(a, max(b - n + 1, a))
        ends = np.repeat(self.starts[first + 1 : last + 1], self.lengths[first:last])[: len(places)]
        hashes = np.zeros(len(places), np.uint64)
        words = mixed(self.words[a:b].astype(np.uint64))
        for offset in range(n if len(places) else 0):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += words[offset : offset + len(places)]
        is_whole = places + n <= ends  # within one text
        return mixed(hashes[is_whole]), places[is_whole]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of texts, as (first, last), of about _CHUNK_WORDS words each."""
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.starts, self.starts[first] + _CHUNK_WORDS, side="right")) - 1
            last = max(first + 1, last)
            yield first, last
            first = last


class Vocabulary:
    """Numbers for words. Texts to be compared need the same vocabulary."""

    def __init__(self) -> None:
        self._numbers: defaultdict[str, int] = defaultdict(count().__next__)

    def encode(self, texts: Iterable[str]) -> Texts:
        """Return the texts as numbers."""
        number, starts, parts = self._numbers.__getitem__, [0], []
        for text in texts:
            words = _WORD.findall(text.lower())
            parts.append(np.fromiter(map(number, words), np.uint32, len(words)))
            starts.append(starts[-1] + len(words))
        return Texts(np.concatenate(parts) if parts else np.zeros(0, np.uint32), np.array(starts))

    def decode(self, words: npt.NDArray[np.uint32]) -> str:
        """Return the words of these numbers."""
        known = list(self._numbers)
        return " ".join(known[word] for word in words)


def mixed(values: Hashes) -> Hashes:
    """Return the values with their bits mixed (the finalizer of SplitMix64, Steele et al., 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
