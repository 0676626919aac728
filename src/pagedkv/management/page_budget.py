"""The pages of one pool: who has them, what waits to be copied, how room is made, and one call at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ..errors import OutOfPagesError
from ..kernels.upload import uploaded
from .allocator import PageAllocator, PageArray
from .prefix_cache import PrefixCache
from .stats import Counters

if TYPE_CHECKING:
    from .ledger import PageLedger
    from .settle import Salvage

__all__ = ["CopyingPool", "PageBudget"]

_NO_PAGES = np.empty(0, np.int32)


class CopyingPool(Protocol):
    """What the management needs of a pool; KVPool is one."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""

    @property
    def device(self) -> torch.device:
        """Where slots and page tables are needed."""

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies page src[i] over page dst[i] in all layers; src, dst [n] int64."""


class PageBudget:
    """All pages of a pool, for one group of layers or for several that share them.

    ledgers: the books of each group. caches: all their prefix caches.
    lock, is_torn, salvage, waiting, verify: see management/whole_call.py and settle.py.
    Owns: a page that a prefix cache holds has one owner, the cache: a sequence's claim on it is its lock there. Any
          other page has as many owners as live sequences name it. A page that waits to be copied from has one more, so
          that nobody is given it before.
    """

    def __init__(
        self, num_pages: int, pool: CopyingPool | None = None, num_reserved: int = 0, num_kept_free: int = 0
    ) -> None:
        self.allocator = PageAllocator(num_pages, num_reserved)
        self.pool = pool
        self.device = pool.device if pool is not None else torch.device("cpu")
        self.is_on_cpu = self.device.type == "cpu"
        self.num_kept_free = num_kept_free
        self.ledgers: list[PageLedger] = []
        self.caches: list[PrefixCache] = []
        self.counters = Counters()
        self.pending_copies: list[tuple[int, int]] = []
        # How often each page is the source of a pending copy.
        self.copy_sources: Counter[int] = Counter()
        self.lock = threading.RLock()
        self.is_torn = False
        self.salvage: list[Salvage] | None = None
        self.waiting: list[Callable[[], None]] = []
        self.verify: Callable[[], None] | None = None

    @property
    def num_evictable(self) -> int:
        """Pages the prefix caches can give back now."""
        return sum([cache.num_evictable_pages for cache in self.caches])

    @property
    def num_sequences(self) -> int:
        """Live sequences, of all groups of layers together."""
        return sum(len(ledger.live) for ledger in self.ledgers)

    def can_obtain(self, num_pages: int, num_kept_free: int = 0) -> bool:
        """True when `obtain` with the same arguments would succeed."""
        missing = num_pages + num_kept_free - self.allocator.num_free
        return num_pages == 0 or missing <= 0 or missing <= self._num_to_be_had()

    def _num_to_be_had(self) -> int:
        """Pages that are free once they are evicted: those that are yet to be copied from are not."""
        if not self.copy_sources:
            return self.num_evictable
        sources = np.fromiter(self.copy_sources, np.int64, len(self.copy_sources))
        return self.num_evictable - sum(int(cache.holds(sources).sum()) for cache in self.caches)

    def obtain(self, num_pages: int, num_kept_free: int = 0) -> PageArray:
        """Allocates, evicting cached pages for what is missing, and leaves `num_kept_free` that are free or evictable.

        Raises: OutOfPagesError, with nothing evicted. It counts the pages to be left as pinned.
        """
        allocator = self.allocator
        missing = num_pages - allocator.num_free
        if missing <= 0 and not num_kept_free:
            return allocator.allocate(num_pages)
        if not self.can_obtain(num_pages, num_kept_free):
            raise self.out_of_pages(num_pages, num_kept_free)
        if self.copy_sources:
            while num_pages > allocator.num_free and self.num_evictable:
                self.evict(num_pages - allocator.num_free)
            return allocator.allocate(num_pages)
        # Pages that a cache alone owns pass to the new owner as they are.
        evicted: list[PageArray] = []
        try:
            for pages in self._evicted(missing):
                evicted.append(pages)
                num_pages -= len(pages)
            if num_pages or not evicted:
                evicted.append(allocator.allocate(num_pages))
        except Exception:  # of a user's policy or cache
            for pages in evicted:
                allocator.release_distinct(pages)
            raise
        return evicted[0] if len(evicted) == 1 else np.concatenate(evicted)

    def obtain_shares(self, needed: list[int], num_kept_free: int = 0) -> list[PageArray]:
        """Allocates for several at once, needed[i] pages for the i-th, or for none."""
        return np.split(self.obtain(sum(needed), num_kept_free), np.cumsum(needed[:-1]))

    def evict(self, num_pages: int) -> int:
        """Takes up to `num_pages` pages that a prefix cache alone holds from it; returns how many are free now.

        Those that wait to be copied from are free after that.
        """
        num_freed = 0
        for pages in self._evicted(num_pages):
            num_freed += self.allocator.release_distinct(pages).shape[0]
        return num_freed

    def evict_from(self, cache: PrefixCache, num_pages: int) -> None:
        """Takes up to `num_pages` pages from one prefix cache."""
        evicted = cache.evict(num_pages)
        self.counters.evicted_pages += evicted.shape[0]
        self.allocator.release_distinct(evicted)

    def _evicted(self, num_pages: int) -> Iterator[PageArray]:
        """Up to `num_pages` pages that caches give up, of the fullest first, and that have an owner yet."""
        while num_pages > 0 and self.caches:
            cache = self.caches[0]
            if len(self.caches) > 1:
                cache = max(self.caches, key=lambda one: one.num_evictable_pages)
            pages = cache.evict(num_pages)
            if not pages.shape[0]:
                return
            self.counters.evicted_pages += pages.shape[0]
            num_pages -= pages.shape[0]
            yield pages

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copies pages (src, dst) in the pool in one call, or notes that the caller has to."""
        if not pairs:
            return
        if self.pool is not None:
            src, dst = uploaded(np.array(pairs, np.int64).T.copy(), self.device)
            self.pool.copy_pages(src, dst)
        else:
            for src, dst in pairs:
                self.allocator.retain([src])
                self.copy_sources[src] += 1
                self.pending_copies.append((src, dst))
        self.counters.copied_pages += len(pairs)

    def take_copies(self) -> list[tuple[int, int]]:
        """The pending copies, each page named once as dst and never as src of what was copied; none are left."""
        source_of: dict[int, int] = {}
        for src, dst in self.pending_copies:
            source_of[dst] = source_of.get(src, src)
        for src, _ in self.pending_copies:
            self.allocator.release([src])
        self.pending_copies.clear()
        self.copy_sources.clear()
        return [(src, dst) for dst, src in source_of.items() if src != dst]

    def cancel_copies(self, pages: PageArray) -> None:
        """Forgets pending copies to pages whose bytes come from elsewhere: they were given back and taken again."""
        taken = set(pages.tolist())
        if taken.isdisjoint(dst for _, dst in self.pending_copies):
            return
        copies = [(src, dst) for src, dst in self.take_copies() if dst not in taken]
        for src, _ in copies:
            self.allocator.retain([src])
        self.pending_copies.extend(copies)
        self.copy_sources.update(src for src, _ in copies)

    def is_shared(self, page: int) -> bool:
        """True when more than one sequence names `page`, which no prefix cache holds."""
        if not self.allocator.num_extra_owners:
            return False
        return self.allocator.num_owners(page) - self.copy_sources.get(page, 0) > 1

    def hand_over(self, pages: PageArray) -> None:
        """Leaves one owner to pages that a prefix cache has just taken from sequences that share them."""
        if not self.allocator.num_extra_owners:
            return
        counts = self.allocator.owner_counts_of(pages)
        for page in pages[counts > 1].tolist():
            while self.is_shared(page):
                self.allocator.release([page])

    def out_of_pages(self, num_pages: int, num_kept_free: int) -> OutOfPagesError:
        """What `obtain` raises."""
        free, evictable = self.allocator.num_free, max(0, self._num_to_be_had())
        kept_evictable = max(0, num_kept_free - free)
        free, evictable = max(0, free - num_kept_free), max(0, evictable - kept_evictable)
        pinned = self.allocator.num_pages - free - evictable
        return OutOfPagesError(num_pages, free, evictable, pinned, self.num_sequences)
