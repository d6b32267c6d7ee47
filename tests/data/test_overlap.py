"""Near-duplicates and shared passages: the fast search finds what a comparison of all pairs finds."""

import random
import re
from itertools import combinations

import numpy as np
import pytest

from fettle.data.ngrams import Vocabulary
from fettle.data.overlap import Sketches, near_groups, near_matches, passages

WORDS = [f"w{number}" for number in range(5000)]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def similarity(a: str, b: str) -> float:
    first, second = shingles(a), shingles(b)
    return len(first & second) / len(first | second) if first and second else 0.0


def corpus(seed: int) -> list[str]:
    """Random texts of 0 to 80 words, most of them followed by a version with a few words changed."""
    chooser = random.Random(seed)
    texts = []
    for _ in range(60):
        words = chooser.choices(WORDS, k=chooser.choice((0, 1, 4, 5, 6, 40, 80)))
        texts.append(" ".join(words))
        for place in chooser.sample(range(len(words)), min(len(words), chooser.choice((0, 1, 2, 4)))):
            words[place] = chooser.choice(WORDS)
        texts.append(", ".join(words).upper())
    return texts


@pytest.mark.parametrize("n", [1, 3, 5, 13])
def test_hashes_are_those_of_the_ngrams(n) -> None:
    texts = corpus(0)
    encoded = Vocabulary().encode(texts)
    known: dict[int, tuple[str, ...]] = {}
    for first, last in ((0, len(texts)), (3, 4), (7, 31)):
        hashes, places = encoded.ngrams(n, first, last)
        owners = np.searchsorted(encoded.starts, places, side="right") - 1
        found = [set() for _ in texts]
        for value, place, owner in zip(hashes.tolist(), places, owners, strict=True):
            words = re.findall(r"\w+", texts[owner].lower())
            start = place - encoded.starts[owner]
            found[owner].add(gram := tuple(words[start : start + n]))
            assert known.setdefault(value, gram) == gram
        assert found[first:last] == [shingles(text, n) for text in texts[first:last]]
    assert len(set(known.values())) == len(known), "equal n-grams have equal hashes"


def test_groups_are_those_of_all_pairs() -> None:
    for seed in range(3):
        texts = corpus(seed)
        near = {
            pair
            for pair in combinations(range(len(texts)), 2)
            if similarity(*(texts[i] for i in pair)) >= 0.8
        }
        found = near_groups(Sketches(Vocabulary().encode(texts)))
        assert near and {pair for group in found for pair in combinations(group, 2)} == near


def test_matches_are_those_of_all_pairs() -> None:
    texts, others = corpus(1)[::2], corpus(1)[1::2]
    vocabulary = Vocabulary()
    found = near_matches(*(Sketches(vocabulary.encode(each)) for each in (texts, others)))
    assert found == {
        b: a
        for a, text in enumerate(texts)
        for b, other in enumerate(others)
        if similarity(text, other) >= 0.8
    }


def test_the_first_and_the_last_text_are_compared() -> None:
    text, other = (" ".join(WORDS[start : start + 9]) for start in (0, 100))
    vocabulary = Vocabulary()
    sketches = Sketches(vocabulary.encode([text, "", other]))
    assert near_matches(sketches, Sketches(vocabulary.encode([other, text]))) == {0: 2, 1: 0}
    assert near_groups(Sketches(vocabulary.encode([text, other, text]))) == [[0, 2]]


def test_many_copies_take_no_quadratic_time() -> None:
    texts = [f"{' '.join(WORDS[:200])} {number}" for number in range(3000)]
    assert near_groups(Sketches(Vocabulary().encode(texts))) == [list(range(3000))]


def test_shared_passages() -> None:
    filler, question = " ".join(WORDS[100:130]), " ".join(WORDS[:20])
    benchmark = [
        question,  # shared: 13 of its words in a row
        " ".join(WORDS[50:62]),  # shared as a whole: 12 words
        " ".join(WORDS[70:77]),  # too short to be compared
        " ".join(WORDS[200:220]),  # only 12 of its words
        "",
    ]
    texts = [
        filler,
        f"{filler} {' '.join(WORDS[3:16]).title()}. {filler}",
        f"{' '.join(WORDS[50:62])}! {' '.join(WORDS[200:212])}; {' '.join(WORDS[70:77])}",
        f"{filler} {' '.join(WORDS[0:7])}",
        f"{' '.join(WORDS[7:13])} {filler}",  # with the text before: 13 words, but in two rows
    ]
    vocabulary = Vocabulary()
    encoded = vocabulary.encode(texts)
    found, sharing = passages(encoded, vocabulary.encode(benchmark))
    assert sharing == {1, 2}
    assert {number: row for number, (row, _, _) in found.items()} == {0: 1, 1: 2}
    _, place, length = found[0]
    assert vocabulary.decode(encoded.words[place : place + length]) == " ".join(WORDS[3:16])
    assert passages(vocabulary.encode([]), vocabulary.encode(benchmark)) == ({}, set())
    assert passages(encoded, vocabulary.encode([])) == ({}, set())
