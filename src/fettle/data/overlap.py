"""Rows that are nearly the same, and rows that share a passage with a benchmark.

Near-duplicates: texts are sets of 5-grams of words, and two are near if the Jaccard similarity of their sets is at
least 0.8 (after Lee et al., 2022, "Deduplicating Training Data Makes Language Models Better", arXiv 2107.06499).
MinHash with banding finds candidates (Broder, 1997; Leskovec et al., "Mining of Massive Datasets", section 3.4): with
16 bands of 5 hashes it misses a pair with a similarity of exactly 0.8 with a probability of (1 - 0.8^5)^16 = 0.2%.
Each candidate is then compared exactly, so what is listed is near.  Texts with fewer than 5 words are not compared.

Benchmarks: a row overlaps a benchmark's text if they share 13 consecutive words (Brown et al., 2020, "Language Models
are Few-Shot Learners", arXiv 2005.14165, appendix C); a text of 8 to 12 words must occur as a whole, a shorter one is
not compared.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from fettle.data.ngrams import Hashes, Indices, Texts, mixed

SHINGLE, MIN_SIMILARITY = 5, 0.8
BANDS, HASHES_PER_BAND = 16, 5
MIN_AGREEMENT = 0.6
"""Candidates that share fewer of the 80 hashes are not compared: of pairs with a similarity of 0.8 those are 1 in 10^5
(4.5 standard deviations of 0.045)."""
MAX_HEADS = 8
"""Texts of a band's bucket that later ones are compared with: with all of them, a bucket's cost would be quadratic."""
PASSAGE, SHORTEST_PASSAGE = 13, 8


class Sketches:
    """Texts with their MinHash signatures. advance: called with the share that is done, 0 to 1."""

    def __init__(self, texts: Texts, advance: Callable[[float], None] = lambda share: None) -> None:
        self.texts = texts
        self.signatures = np.full((len(texts), BANDS * HASHES_PER_BAND), 2**32 - 1, np.uint32)
        random = np.random.default_rng(0)
        factors = random.integers(1 << 63, size=self.signatures.shape[1], dtype=np.uint64) | np.uint64(1)
        for first, last in texts.chunks():
            hashes, _ = texts.ngrams(SHINGLE, first, last)
            counts = np.maximum(texts.lengths[first:last] - SHINGLE + 1, 0)
            rows = np.flatnonzero(counts)
            starts = (np.cumsum(counts) - counts)[rows]
            for column, factor in enumerate(factors if len(rows) else ()):
                hashed = ((hashes ^ (factor >> np.uint64(1))) * factor) >> np.uint64(32)
                self.signatures[first + rows, column] = np.minimum.reduceat(hashed, starts)
            advance(last / len(texts))

    def is_near(self, number: int, others: "Sketches", other: int) -> bool:
        """Whether text `number` is near text `other` of `others`."""
        if (self.signatures[number] == others.signatures[other]).mean() < MIN_AGREEMENT:
            return False
        a, b = self._shingles(number), others._shingles(other)
        shared = np.intersect1d(a, b, assume_unique=True).size
        return bool(shared >= MIN_SIMILARITY * (a.size + b.size - shared))

    def _shingles(self, number: int) -> Hashes:
        return np.unique(self.texts.ngrams(SHINGLE, number, number + 1)[0])


def near_groups(sketches: Sketches) -> list[list[int]]:
    """Return groups of texts in which each is near another one of the group, in order."""
    parents = list(range(len(sketches.texts)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    for bucket in _buckets(sketches.signatures):
        heads: list[int] = []
        for number in bucket:
            head = next(
                (h for h in heads if root(h) == root(number) or sketches.is_near(h, sketches, number)), None
            )
            if head is not None:
                parents[max(root(head), root(number))] = min(root(head), root(number))
            elif len(heads) < MAX_HEADS:
                heads.append(number)
    groups: dict[int, list[int]] = {}
    for number in range(len(parents)):
        groups.setdefault(root(number), []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def near_matches(sketches: Sketches, others: Sketches) -> dict[int, int]:
    """Return for each text of `others` that is near one of `sketches` the number of that one."""
    size, found = len(sketches.texts), {}
    for bucket in _buckets(np.concatenate([sketches.signatures, others.signatures])):
        heads = [number for number in bucket if number < size][:MAX_HEADS]
        for other in (number - size for number in bucket if heads and number >= size):
            if other in found:
                continue
            near = next((head for head in heads if sketches.is_near(head, others, other)), None)
            if near is not None:
                found[other] = near
    return found


def _buckets(signatures: npt.NDArray[np.uint32]) -> Iterator[list[int]]:
    """Yield the texts, at least two and in order, that agree in all hashes of a band."""
    for band in range(0, signatures.shape[1], HASHES_PER_BAND):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band, band + HASHES_PER_BAND):
            keys = mixed(keys ^ signatures[:, column])
        has_words = signatures[:, band] < 2**32 - 1
        order = np.flatnonzero(has_words)[np.argsort(keys[has_words], kind="stable")]
        borders = np.flatnonzero(np.diff(keys[order])) + 1
        for start, end in zip([0, *borders], [*borders, len(order)], strict=True):
            if end - start > 1:
                yield order[start:end].tolist()


def passages(texts: Texts, benchmark: Texts) -> tuple[dict[int, tuple[int, int, int]], set[int]]:
    """Return what the texts share with a benchmark's texts.

    First, for each text of the benchmark that shares a passage: the number of a text that has it, and the place and the
    number of its words. Second, all texts that share one.
    """
    found: dict[int, tuple[int, int, int]] = {}
    sharing: set[int] = set()
    for n in range(SHORTEST_PASSAGE, PASSAGE + 1):
        lengths = benchmark.lengths
        wanted = np.flatnonzero(lengths == n if n < PASSAGE else lengths >= n)
        if not wanted.size:
            continue
        hashes, owners = _of(benchmark, wanted, n)
        hits, rows, places = _hits(texts, np.sort(hashes), n)
        sharing |= set(rows.tolist())
        _, first = np.unique(hits, return_index=True)
        seen = {int(hits[i]): (int(rows[i]), int(places[i]), n) for i in first}
        for place in np.flatnonzero(np.isin(hashes, hits)):
            found.setdefault(int(owners[place]), seen[int(hashes[place])])
    return found, sharing


def _of(texts: Texts, wanted: Indices, n: int) -> tuple[Hashes, Indices]:
    """Return the hashes of the n-grams of the wanted texts, and the text of each."""
    hashes, places = texts.ngrams(n, 0, len(texts))
    owners = np.searchsorted(texts.starts, places, side="right") - 1
    is_wanted = np.isin(owners, wanted)
    return hashes[is_wanted], owners[is_wanted]


def _hits(texts: Texts, wanted: Hashes, n: int) -> tuple[Hashes, Indices, Indices]:
    """Return the n-grams of the texts that are among the sorted `wanted`: their hashes, texts and places."""
    hits, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for first, last in texts.chunks():
        hashes, at = texts.ngrams(n, first, last)
        nearest = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        is_hit = wanted[nearest] == hashes
        hits.append(hashes[is_hit])
        places.append(at[is_hit])
    at = np.concatenate(places)
    return np.concatenate(hits), np.searchsorted(texts.starts, at, side="right") - 1, at
