"""The books that all sequences of a manager share: owners of pages, prefix caches, copies, and how room is made."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import OutOfPagesError
from .allocator import PageAllocator, PageArray
from .prefix_cache import CacheHandle, Namespace, PrefixCache, namespace_key
from .sequence_rows import SequenceRows
from .stats import Counters

if TYPE_CHECKING:
    from .pinned import PinnedPrefix
    from .sequence import Sequence

__all__ = ["PageLedger", "PagePool"]

_NO_PAGES = np.empty(0, np.int32)


class PagePool(Protocol):
    """What the management needs of a pool; KVPool is one."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""

    @property
    def page_size(self) -> int:
        """Token slots a page."""

    @property
    def device(self) -> torch.device:
        """Where slots and page tables are needed."""

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies page src[i] over page dst[i] in all layers; src, dst [n] int64."""


class PageLedger:
    """One manager's state. `with ledger:` is one public call: it holds the lock, and in debug mode checks at its end.

    Owns: a page that a prefix cache holds has one owner, the cache: a sequence's claim on it is its lock there. Any
          other page has as many owners as live sequences name it. A page that waits to be copied from has one more, so
          that nobody is given it before.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        pool: PagePool | None,
        cache: PrefixCache | None,
        num_reserved: int = 0,
        num_kept_free: int = 0,
    ) -> None:
        self.allocator = PageAllocator(num_pages, num_reserved)
        self.page_size = page_size
        self.pool = pool
        self.device = pool.device if pool is not None else torch.device("cpu")
        self.is_on_cpu = self.device.type == "cpu"
        self.cache = cache
        # Caches of the namespaces that have a limit, by namespace_key, and what the limit is.
        self.limited: dict[Any, tuple[PrefixCache, int]] = {}
        self.num_kept_free = num_kept_free
        self.rows = SequenceRows()
        self.live: dict[int, Sequence] = {}
        self.pins: dict[int, PinnedPrefix] = {}
        self.counters = Counters()
        self.pending_copies: list[tuple[int, int]] = []
        # How often each page is the source of a pending copy.
        self.copy_sources: Counter[int] = Counter()
        self.verify: Callable[[], None] | None = None
        self.lock = threading.RLock()
        self._depth = 0

    def __enter__(self) -> PageLedger:
        self.lock.acquire()
        self._depth += 1
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._depth == 1 and self.verify is not None:
                self.verify()
        finally:
            self._depth -= 1
            self.lock.release()

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

    def look_up(
        self, cache: PrefixCache | None, ids: npt.NDArray[Any], namespace: Namespace
    ) -> tuple[int, PageArray, CacheHandle | None]:
        """The longest cached prefix: its tokens, its pages, and the handle, which is locked; None for no tokens."""
        if cache is None:
            return 0, _NO_PAGES, None
        match, counters = cache.match(ids, namespace), self.counters
        counters.lookups += 1
        counters.asked_tokens += ids.shape[0]
        counters.hit_tokens += match.num_tokens
        if not match.num_tokens:
            return 0, _NO_PAGES, None
        cache.lock(match.handle)
        return match.num_tokens, match.pages, match.handle

    @property
    def num_evictable(self) -> int:
        """Pages the prefix caches can give back now."""
        if not self.limited:
            return 0 if self.cache is None else self.cache.num_evictable_pages
        return sum(cache.num_evictable_pages for cache in self.caches())

    def can_obtain(self, num_pages: int, num_kept_free: int = 0) -> bool:
        """True when `obtain` with the same arguments would succeed."""
        missing = num_pages + num_kept_free - self.allocator.num_free
        # A page that is yet to be copied from can be evicted, and is not free before it was.
        return num_pages == 0 or missing <= 0 or missing <= self.num_evictable - len(self.copy_sources)

    def obtain(self, num_pages: int, num_kept_free: int = 0) -> PageArray:
        """Allocates, evicting cached pages for what is missing, and leaves `num_kept_free` that are free or evictable.

        Raises: OutOfPagesError, with nothing evicted. It counts the pages to be left as pinned.
        """
        pages = self.allocator.try_allocate(num_pages) if not num_kept_free else None
        if pages is not None:
            return pages
        if not self.can_obtain(num_pages, num_kept_free):
            free, evictable = self.allocator.num_free, max(0, self.num_evictable - len(self.copy_sources))
            kept_evictable = max(0, num_kept_free - free)
            free, evictable = max(0, free - num_kept_free), max(0, evictable - kept_evictable)
            pinned = self.allocator.num_pages - free - evictable
            raise OutOfPagesError(num_pages, free, evictable, pinned, len(self.live))
        if self.allocator.num_extra_owners:
            while num_pages > self.allocator.num_free and self.evict(num_pages - self.allocator.num_free):
                pass
            return self.allocator.allocate(num_pages)
        # Pages that the cache alone owns pass to the new owner as they are.
        evicted = [*self._evicted(num_pages - self.allocator.num_free)]
        rest = self.allocator.allocate(num_pages - sum(map(len, evicted)))
        return np.concatenate([*reversed(evicted), rest])

    def evict(self, num_pages: int) -> int:
        """Frees up to `num_pages` pages that a prefix cache alone holds, of the fullest first; returns how many."""
        num_evicted = 0
        for pages in self._evicted(num_pages):
            self.allocator.release_distinct(pages)
            num_evicted += pages.shape[0]
        return num_evicted

    def _evicted(self, num_pages: int) -> Iterator[PageArray]:
        """Up to `num_pages` pages that caches give up, and that have an owner yet."""
        while num_pages > 0:
            cache = self.cache
            if self.limited:
                cache = max(self.caches(), key=lambda one: one.num_evictable_pages)
            pages = cache.evict(num_pages) if cache is not None else _NO_PAGES
            if not pages.shape[0]:
                return
            self.counters.evicted_pages += pages.shape[0]
            num_pages -= pages.shape[0]
            yield pages

    def evict_from(self, cache: PrefixCache, num_pages: int) -> int:
        """Frees up to `num_pages` pages of one prefix cache; returns how many."""
        evicted = cache.evict(num_pages)
        self.allocator.release_distinct(evicted)
        self.counters.evicted_pages += evicted.shape[0]
        return int(evicted.shape[0])

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copies pages (src, dst) in the pool in one call, or notes that the caller has to."""
        if not pairs:
            return
        if self.pool is not None:
            ids = torch.tensor(pairs, dtype=torch.int64, device=self.device)
            self.pool.copy_pages(ids[:, 0].contiguous(), ids[:, 1].contiguous())
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

    def is_shared(self, page: int) -> bool:
        """True when more than one sequence names `page`, which no prefix cache holds."""
        return self.allocator.num_owners(page) - self.copy_sources.get(page, 0) > 1

    def hand_over(self, pages: PageArray) -> None:
        """Leaves one owner to pages that a prefix cache has just taken from sequences that share them."""
        if not self.allocator.num_extra_owners:
            return
        counts = self.allocator.owner_counts_of(pages)
        for page in pages[counts > 1].tolist():
            while self.is_shared(page):
                self.allocator.release([page])

    def num_named(self) -> PageArray:
        """How many live sequences name each page, [num_pages]. Cost: a pass over the pages of the sequences."""
        parts = [seq.row_pages() for seq in self.live.values()]
        named = np.concatenate([np.empty(0, np.int32), *parts])
        return np.bincount(named[named >= 0], minlength=self.allocator.num_pages).astype(np.int32)
