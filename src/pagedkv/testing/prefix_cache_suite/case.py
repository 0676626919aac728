"""One case of the suite, and the small language it is written in: prompts as words, a page a letter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...management.token_ids import TokenArray

__all__ = ["Check", "MakeCache", "PrefixCacheCase", "World", "equal", "refused"]

# Makes an empty cache of this page size; options are those of the constructor: eviction=, events=.
MakeCache = Callable[..., Any]


class World:
    """Caches of one kind and page size, and words that name prompts.

    A letter is a page of tokens; a capital letter is the same page but for its last token. So "ab" and "aB" share all
    tokens except one, and words that begin with the same letters share these pages and no others.
    """

    def __init__(self, make: MakeCache, page_size: int) -> None:
        self.make, self.page_size = make, page_size

    def cache(self, **options: Any) -> Any:
        """An empty cache."""
        return self.make(self.page_size, **options)

    def filled(self, **options: Any) -> Any:
        """A cache of "abc" on pages 10, 11, 12, and a branch "ad" on 10, 13."""
        cache = self.cache(**options)
        self.insert(cache, "abc", [10, 11, 12])
        self.insert(cache, "ad", [10, 13])
        return cache

    def ids(self, word: str, num_more: int = 0) -> TokenArray:
        """The tokens of `word`, and `num_more` tokens that fill no page."""
        pages = [self._page(letter) for letter in word]
        return np.concatenate([np.empty(0, np.int64), *pages, np.arange(num_more, dtype=np.int64)])

    def num_tokens(self, word: str) -> int:
        """How many tokens `word` has."""
        return len(word) * self.page_size

    def insert(self, cache: Any, word: str, pages: list[int], namespace: Any = None, **options: Any) -> Any:
        """Inserts `word`; the result of the cache."""
        return cache.insert(self.ids(word), pages, namespace, **options)

    def extend(self, cache: Any, handle: Any, word: str, pages: list[int], **options: Any) -> Any:
        """Extends `handle` by `word`; the result of the cache.

        A cache may let the lock of `handle` cover the new pages: a case that looks at locks locks the handle of the
        result then and unlocks this one, as a sequence does.
        """
        return cache.extend(handle, self.ids(word), pages, **options)

    def handle(self, cache: Any, word: str, namespace: Any = None) -> Any:
        """A handle of what is cached of `word`; looking it up is a use of it."""
        return cache.match(self.ids(word), namespace).handle

    def found(self, cache: Any, word: str, namespace: Any = None) -> list[int]:
        """The pages that a lookup of `word` finds, after a check of its form."""
        num_tokens, pages, handle = cache.match(self.ids(word), namespace)
        equal("num_tokens of a match", num_tokens, len(pages) * self.page_size)
        equal("num_tokens of its handle", handle.num_tokens, num_tokens)
        equal("dtype of its pages", pages.dtype.name, "int32")
        ids: list[int] = pages.tolist()
        return ids

    def _page(self, letter: str) -> TokenArray:
        page = np.arange(self.page_size, dtype=np.int64) + 1000 * ord(letter.lower())
        page[-1] += 500 * letter.isupper()
        return page


Check = Callable[[World], None]


@dataclass(frozen=True, eq=False)
class PrefixCacheCase:
    """A situation and the check of it. Raises: when called, AssertionError, and whatever the cache raises."""

    situation: str
    page_size: int
    check: Check

    def __str__(self) -> str:
        return f"{self.situation}-P{self.page_size}"

    def __call__(self, make: MakeCache) -> None:
        """Runs the case on new caches: `make(page_size, **options)`."""
        self.check(World(make, self.page_size))


def equal(what: str, got: object, wanted: object) -> None:
    """Raises AssertionError that names both when they differ."""
    if got != wanted:
        raise AssertionError(f"{what} must be {wanted}, got {got}.")


@contextmanager
def refused(words: str, *kinds: type[Exception]) -> Iterator[None]:
    """The block must raise one of `kinds` (ValueError when none is given) with a message that has `words` in it."""
    expected = kinds or (ValueError,)
    try:
        yield
    except expected as error:
        if words not in str(error):
            raise AssertionError(f"the error must say {words!r}, got {str(error)!r}.") from error
    else:
        raise AssertionError(f"the call must be refused with {words!r}, got no error.")
