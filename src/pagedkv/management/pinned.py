"""Prefixes that stay in the prefix cache whether or not a sequence uses them."""

from __future__ import annotations

from types import TracebackType

from .allocator import PageArray
from .ledger import PageLedger
from .prefix_cache import CacheHandle, Namespace, PrefixCache
from .whole_call import closing_call

__all__ = ["PinnedPrefix"]


class PinnedPrefix:
    """A cached prefix that is not evicted until `unpin`; made by `KVCacheManager.pin`.

    num_tokens: how much of what was asked for is pinned, whole pages; 0 when nothing of it was cached.
    Owns:       a lock of the prefix cache. Pages that it alone protects count as cached, and are not evictable.
    """

    def __init__(
        self,
        ledger: PageLedger,
        namespace: Namespace,
        cache: PrefixCache | None,
        handle: CacheHandle | None,
        pages: PageArray,
    ) -> None:
        """For the manager: `handle` is locked, and this gives the lock back."""
        self._ledger = ledger
        self._budget = ledger.budget
        self._namespace = namespace
        self._cache = cache
        self._handle = handle
        self._pages = pages
        self.num_tokens: int = 0 if handle is None else handle.num_tokens
        ledger.pins[id(self)] = self

    @property
    def namespace(self) -> Namespace:
        """Whose prefix it is."""
        return self._namespace

    @property
    def page_ids(self) -> tuple[int, ...]:
        """The pinned pages in order of position; none once it is unpinned."""
        return tuple(self._pages.tolist()) if self.is_pinned else ()

    @property
    def is_pinned(self) -> bool:
        """False once it is unpinned."""
        return id(self) in self._ledger.pins

    @property
    def lock_handle(self) -> CacheHandle | None:
        """What it locks of the prefix cache, for inspection."""
        return self._handle

    @property
    def cache(self) -> PrefixCache | None:
        """Where its namespace is cached, for inspection."""
        return self._cache

    @closing_call
    def unpin(self) -> None:
        """Leaves the pages to the eviction policy again. Idempotent."""
        if self._ledger.pins.pop(id(self), None) is None:
            return
        if self._cache is not None and self._handle is not None:
            self._cache.unlock(self._handle)
        self._handle = None

    def _forget(self) -> None:
        """What it pinned is not there any more."""
        self._handle, self._pages, self.num_tokens = None, self._pages[:0], 0

    def __enter__(self) -> PinnedPrefix:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unpin()

    def __repr__(self) -> str:
        return f"PinnedPrefix({self.num_tokens} tokens, {'pinned' if self.is_pinned else 'unpinned'})"
