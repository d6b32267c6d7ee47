"""Batches of rows whose lengths differ, so that every batch has about as many tokens as the others.

Batches drawn at random may have several of the longest rows together, and the memory of a run is that of its largest
batch. Here rows go from the longest to the shortest, each to the batch with the fewest tokens that has room (Graham,
1969), after their lengths have been changed at random by up to a tenth, so that rows meet others in each epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from random import Random

from torch.utils.data import Sampler

JITTER = 0.1


def balanced_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Return the rows of each batch of an epoch, in random order; all but the last one have `batch_size` rows.

    The same arguments give the same batches.
    """
    random = Random(f"{seed} {epoch}")
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    rest = len(rows) % batch_size
    last = [rows.pop() for _ in range(rest)]
    rows.sort(key=lambda row: -lengths[row] * (1 + JITTER * random.random()))
    batches: list[list[int]] = [[] for _ in range(len(rows) // batch_size)]
    open_batches = [(0, random.random(), number) for number in range(len(batches))]
    for row in rows:
        tokens, tie, number = heappop(open_batches)
        batches[number].append(row)
        if len(batches[number]) < batch_size:
            heappush(open_batches, (tokens + lengths[row], tie, number))
    random.shuffle(batches)
    for batch in batches:
        random.shuffle(batch)
    return [*batches, last] if last else batches


class BalancedSampler(Sampler[int]):
    """The rows of `balanced_batches`, one after the other, for a data loader with the same batch size.

    epoch: returns the number of the epoch that begins.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __iter__(self) -> Iterator[int]:
        batches = balanced_batches(self.lengths, self.batch_size, seed=self.seed, epoch=self.epoch())
        return (row for batch in batches for row in batch)

    def __len__(self) -> int:
        return len(self.lengths)
