"""The books that all sequences of a manager share: owners of pages, the prefix cache, and how room is made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import OutOfPagesError
from .allocator import PageAllocator, PageArray
from .radix_cache import RadixCache
from .stats import Counters

if TYPE_CHECKING:
    from .sequence import Sequence

__all__ = ["PageLedger", "PagePool"]


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

    Owns: the count of a page is the number of live sequences that name it, plus one when the prefix cache holds it.
    """

    def __init__(self, num_pages: int, page_size: int, pool: PagePool | None, cache: RadixCache | None) -> None:
        self.allocator = PageAllocator(num_pages)
        self.page_size = page_size
        self.pool = pool
        self.device = pool.device if pool is not None else torch.device("cpu")
        self.cache = cache
        self.live: dict[int, Sequence] = {}
        self.counters = Counters()
        self.pending_copies: list[tuple[int, int]] = []
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

    @property
    def num_evictable(self) -> int:
        """Pages the prefix cache can give back now."""
        return 0 if self.cache is None else self.cache.num_evictable_pages

    def can_obtain(self, num_pages: int) -> bool:
        """True when `obtain(num_pages)` would succeed."""
        return num_pages <= self.allocator.num_free + self.num_evictable

    def obtain(self, num_pages: int) -> PageArray:
        """Allocates, evicting cached pages for what is missing. Raises: OutOfPagesError, with nothing evicted."""
        num_free = self.allocator.num_free
        if not self.can_obtain(num_pages):
            pinned = self.allocator.num_pages - num_free - self.num_evictable
            raise OutOfPagesError(num_pages, num_free, self.num_evictable, pinned, len(self.live))
        if num_pages > num_free:
            self.evict(num_pages - num_free)
        return self.allocator.allocate(num_pages)

    def evict(self, num_pages: int) -> int:
        """Frees up to `num_pages` pages that the prefix cache alone holds; returns how many."""
        if self.cache is None:
            return 0
        evicted = self.cache.evict(num_pages)
        self.allocator.release(evicted)
        self.counters.evicted_pages += evicted.shape[0]
        return int(evicted.shape[0])

    def copy_page(self, src: int, dst: int) -> None:
        """Copies a page in the pool, or notes that the caller has to."""
        if self.pool is None:
            self.pending_copies.append((src, dst))
        else:
            ids = torch.tensor([[src], [dst]], dtype=torch.int64, device=self.device)
            self.pool.copy_pages(ids[0], ids[1])
        self.counters.copied_pages += 1

    def num_named(self) -> PageArray:
        """How many live sequences name each page, [num_pages], from the counts."""
        counts = self.allocator.owner_counts()
        if self.cache is not None:
            counts -= self.cache.held_mask(counts.shape[0])
        return counts
