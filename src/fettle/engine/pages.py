"""Which page of the key-value cache belongs to whom, and which pages hold a prefix that can be reused.

A full page whose tokens have been computed is published under its tokens and the page before it. A later sequence that
begins with the same tokens uses the same pages. Published pages that nobody uses stay until their memory is needed,
those used longest ago first (Kwon et al., 2023, arXiv 2309.06180, section 4.3).
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

PAGE_SIZE = 16
"""Tokens per page: of a shared prefix at most one less are computed again."""


class _Key(NamedTuple):
    """What a page holds: its own tokens, after those of `before` (the entry of the page before it, or the root)."""

    before: Hashable
    tokens: tuple[int, ...]


class PagePool:
    """The pages of one cache, numbered from 0."""

    def __init__(self, pages: int, page_size: int = PAGE_SIZE) -> None:
        self.pages, self.page_size = pages, page_size
        self._empty = list(range(pages - 1, -1, -1))
        """Free pages without reusable content; the lowest number is taken first."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published pages that nobody uses, those used longest ago first."""
        self._users = [0] * pages
        self._page_of: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._entry_of: dict[int, int] = {}
        """A number per published page that no other page ever gets."""
        self._entries = 0

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._empty) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages hold that many tokens."""
        return -(-tokens // self.page_size)

    def take(self) -> int:
        """Return a free page; there must be one."""
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._withdraw(page)
        self._users[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. The last ones are released first, as a prefix is worth more than what follows it."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._empty.append(page)

    def publish(
        self, pages: Sequence[int], tokens: Sequence[int], root: Hashable, *, begin: int, end: int
    ) -> None:
        """Make the pages reusable that are full now that the tokens from `begin` to `end` have been computed.

        pages, tokens: of the whole sequence. root: what else its keys and values depend on.
        """
        size = self.page_size
        for number in range(begin // size, end // size):
            before = root if number == 0 else self._entry_of.get(pages[number - 1])
            if before is None or pages[number] in self._key_of:
                continue
            key = _Key(before, tuple(tokens[number * size : (number + 1) * size]))
            if key not in self._page_of:
                self._entries += 1
                self._page_of[key], self._key_of[pages[number]] = pages[number], key
                self._entry_of[pages[number]] = self._entries

    def find_prefix(self, tokens: Sequence[int], root: Hashable) -> list[int]:
        """Return the published pages that `tokens` begin with; they are not in use yet: see `use`."""
        found: list[int] = []
        before, size = root, self.page_size
        for start in range(0, len(tokens) - size + 1, size):
            page = self._page_of.get(_Key(before, tuple(tokens[start : start + size])))
            if page is None:
                break
            found.append(page)
            before = self._entry_of[page]
        return found

    def use(self, pages: Sequence[int]) -> None:
        """Take published pages, which others may use too."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def idle_among(self, pages: Sequence[int]) -> int:
        """Return how many of these pages are free at present."""
        return sum(self._users[page] == 0 for page in pages)

    def _withdraw(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        del self._entry_of[page]
