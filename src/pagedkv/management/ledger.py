"""The books of one group of layers: its sequences, its pins and its prefix caches, on pages of a budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .allocator import PageArray
from .page_budget import PageBudget
from .prefix_cache import CacheHandle, Namespace, PrefixCache, namespace_key
from .sequence_rows import SequenceRows

if TYPE_CHECKING:
    from .pinned import PinnedPrefix
    from .sequence import Sequence
    from .step_planner import StepPlanner

__all__ = ["PageLedger"]

# 32 MiB of slots.
_MOST_SLOTS_LISTED = 2**22
_NO_PAGES = np.empty(0, np.int32)


class PageLedger:
    """One manager's state besides the pages.

    cache:   the prefix cache of all namespaces but those in `limited`, None for none.
    limited: for each namespace that has a limit, by `namespace_key`, its own cache and how many pages it may hold.
    window:  the window of all its sequences, for which the caches keep pages; None when each has its own or none.
    rows, live, pins, planner: its sequences, as arrays and as objects, its pinned prefixes, and what a step keeps.
    """

    def __init__(
        self,
        budget: PageBudget,
        page_size: int,
        cache: PrefixCache | None,
        limited: dict[Any, tuple[PrefixCache, int]] | None = None,
        window: int | None = None,
    ) -> None:
        self.budget = budget
        self.allocator = budget.allocator
        self.page_size = page_size
        self._slots_of_page: npt.NDArray[np.int64] | None = None
        self.window = window
        self.cache = cache
        self.limited = limited or {}
        self.rows = SequenceRows()
        self.live: dict[int, Sequence] = {}
        self.pins: dict[int, PinnedPrefix] = {}
        self.planner: StepPlanner | None = None
        budget.ledgers.append(self)
        budget.caches.extend(self.caches())

    def caches(self) -> Iterator[PrefixCache]:
        """Every prefix cache: the shared one, and one for each namespace that has a limit."""
        if self.cache is not None:
            yield self.cache
        for cache, _ in self.limited.values():
            yield cache

    def cache_of(self, namespace: Namespace) -> tuple[PrefixCache | None, int | None]:
        """Where a namespace is cached, and how many pages it may have there, None for no limit."""
        if not self.limited:
            return self.cache, None
        return self.limited.get(namespace_key(namespace), (self.cache, None))

    def slots_of(self, pages: PageArray) -> npt.NDArray[np.int64]:
        """The slots of some pages, in order."""
        table, page_size = self._slots_of_page, self.page_size
        if table is None:
            num_slots = self.allocator.num_pages * page_size
            if num_slots > _MOST_SLOTS_LISTED:
                counted: npt.NDArray[np.int64] = np.add.outer(pages * np.int64(page_size), np.arange(page_size))
                return counted.reshape(-1)
            # Copying the rows of a list takes a third of the time that counting takes.
            table = self._slots_of_page = np.arange(num_slots).reshape(-1, page_size)
        return table.take(pages, 0).reshape(-1)

    def look_up(
        self, cache: PrefixCache | None, ids: npt.NDArray[Any], namespace: Namespace
    ) -> tuple[int, PageArray, CacheHandle | None]:
        """The longest cached prefix: its tokens, its pages, and the handle, which is locked; None for no tokens."""
        if cache is None:
            return 0, _NO_PAGES, None
        match = cache.match(ids, namespace)
        if not match.num_tokens:
            return 0, _NO_PAGES, None
        cache.lock(match.handle)
        return match.num_tokens, match.pages, match.handle

    def num_named(self) -> PageArray:
        """How many live sequences name each page, [num_pages]. Cost: a pass over the pages of the sequences."""
        parts = [seq.row_pages() for seq in self.live.values()]
        named = np.concatenate([np.empty(0, np.int32), *parts])
        return np.bincount(named[named >= 0], minlength=self.allocator.num_pages).astype(np.int32)
