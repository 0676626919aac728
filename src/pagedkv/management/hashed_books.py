"""What a hashed cache keeps, and how that changes where no window limits what a token sees."""

from __future__ import annotations

from itertools import count
from sys import getsizeof
from typing import Any

import numpy as np
import numpy.typing as npt

from ..shapes import check_int
from .allocator import PageArray, PageIds
from .events import EventLog
from .eviction import EvictionPolicy, EvictionQueue
from .hashed_page import HashedPage
from .hashed_table import DigestTable
from .page_hash import PageHash, digest_pages, page_bytes
from .prefix_cache import EMPTY_HANDLE, CacheHandle, InsertResult, namespace_key
from .radix_tree import as_page_array
from .token_ids import TokenArray

__all__ = ["SERIALS", "SERIAL_BITS", "HashedBooks"]

SERIAL_BITS = 40

# Stands in the handles of a cache, which no other cache takes. Bits above it say when, in a cache with a window.
SERIALS = count(1)
_SERIAL_MASK = 2**SERIAL_BITS - 1


class HashedBooks:
    """Pages by digest and by number, roots by namespace, counters, and the checks of what a cache is given."""

    def __init__(self, page_size: int, policy: EvictionPolicy, page_hash: PageHash) -> None:
        check_int("page_size", page_size, minimum=1)
        if not callable(page_hash):
            raise TypeError(f"page_hash must be a function of bytes, got {type(page_hash).__name__}.")
        self.page_size = page_size
        self.events: EventLog | None = None
        self._serial = next(SERIALS)
        self._page_hash = page_hash
        self._queue: EvictionQueue[Any] = EvictionQueue(policy)
        self._table = DigestTable(page_size, page_hash)
        self._roots: dict[Any, Any] = {}
        self._by_page: dict[int, Any] = {}
        # What a handle of an unknown namespace names; nothing is put behind it.
        self._void = HashedPage(None, None, b"", b"", -1, 0)
        self._time = 0
        self._num_locked_pages = 0

    @property
    def num_cached_pages(self) -> int:
        """Pages in the table."""
        return len(self._by_page)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens in the table."""
        return self.num_cached_pages * self.page_size

    @property
    def num_evictable_pages(self) -> int:
        """Pages that nothing locks; `evict` can free all of them."""
        return len(self._by_page) - self._num_locked_pages

    @property
    def num_evictable_tokens(self) -> int:
        """Tokens in pages that nothing locks."""
        return self.num_evictable_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """Bytes that the pages take, what is kept of pages that left included, queue and locks left out; walks them."""
        tables = getsizeof(self._roots) + getsizeof(self._by_page) + self._table.num_bytes
        return tables + sum(int(page.num_bytes) for page in self._table.pages())

    def holds(self, pages: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Which of `pages` are in the cache."""
        return np.array([page in self._by_page for page in pages.tolist()], np.bool_)

    def held_mask(self, num_pages: int) -> npt.NDArray[np.bool_]:
        """For each page 0..num_pages-1 whether it is in the cache."""
        mask = np.zeros(num_pages, np.bool_)
        held = np.fromiter(self._by_page, np.int64, len(self._by_page))
        mask[held[held < num_pages]] = True
        return mask

    def _walk(self, node: HashedPage, ids: TokenArray) -> tuple[HashedPage, list[int]]:
        """Follows `ids` as far as whole pages are there: the last of them, and the ids of all."""
        chain = self._table.chain(node, ids)
        return (chain[-1] if chain else node), [page.page for page in chain]

    def _insert_behind(
        self, start: HashedPage, start_tokens: int, ids: TokenArray, pages: PageArray, only_new: bool, priority: int
    ) -> InsertResult:
        last, found = self._walk(start, ids)
        num_cached, page_size = len(found), self.page_size
        num_known = pages.shape[0] if not (only_new and num_cached) else num_cached
        if num_known > num_cached:
            new_ids = ids[num_cached * page_size : num_known * page_size]
            last = self._add(last, new_ids, pages[num_cached:num_known], priority)
        last.priority = max(last.priority, priority)
        self._use(last)
        handle = self._handle(last, start_tokens + num_known * page_size)
        return InsertResult(num_cached * page_size, handle)

    def _add(self, last: HashedPage, ids: TokenArray, pages: PageArray, priority: int) -> HashedPage:
        """Puts `pages` behind `last`; returns the last of them."""
        page_ids: list[int] = pages.tolist()
        self._check_new(page_ids)
        digests = digest_pages(last.digest, ids, self.page_size, self._page_hash)
        if self.events is not None:
            self.events.stored(last.page if last.num_pages else None, pages, ids, last.namespace, self.page_size)
        tokens, add = page_bytes(ids, self.page_size), self._table.add
        for page, digest, token_bytes in zip(page_ids, digests, tokens, strict=True):
            node = HashedPage(last, last.namespace, digest, token_bytes, page, self._time + 1)
            node.priority = priority
            add(node)
            self._by_page[page] = node
            last.num_children += 1
            last = node
        return last

    def _lock(self, node: HashedPage) -> None:
        node.anchors += 1
        while node.parent is not None:
            node.locks += 1
            if node.locks > 1:
                break
            self._num_locked_pages += 1
            node = node.parent

    def _unlock(self, node: HashedPage) -> None:
        node.anchors -= 1
        while node.parent is not None:
            node.locks -= 1
            if node.locks:
                break
            self._num_locked_pages -= 1
            node = node.parent

    def _use(self, node: HashedPage) -> None:
        self._time += 1
        node.last_access = self._time
        self._queue.offer(node)

    def _drop(self, node: HashedPage) -> None:
        """Takes an evictable page out of the tables and hands what is known of its uses on to its parent."""
        parent = node.parent
        assert parent is not None  # roots and dropped pages are not evictable
        self._table.remove(node)
        del self._by_page[node.page]
        node.parent = None
        parent.num_children -= 1
        parent.last_access = max(parent.last_access, node.last_access)
        parent.priority = max(parent.priority, node.priority)
        parent.num_hits += node.num_hits
        if parent.parent is not None:
            self._queue.offer(parent)
        elif not parent.num_children:
            del self._roots[namespace_key(parent.namespace)]

    def _handle(self, last: HashedPage, num_tokens: int) -> CacheHandle:
        return CacheHandle(last, self._serial, num_tokens) if num_tokens else EMPTY_HANDLE

    def _check_own(self, handle: CacheHandle) -> None:
        if not isinstance(handle, CacheHandle):
            raise TypeError(f"handle must be one of this cache, got {type(handle).__name__}.")
        is_own = handle.version & _SERIAL_MASK == self._serial and isinstance(handle.node, HashedPage)
        if handle.num_tokens and not is_own:
            raise ValueError(f"handle must be one of this cache, got one of {handle.num_tokens} tokens of another.")

    def _check_current(self, handle: CacheHandle) -> None:
        self._check_own(handle)
        if handle.num_tokens and not self._is_there(handle):
            raise ValueError(
                f"handle must name a prefix that is still cached, got one of {handle.num_tokens} tokens that changed. "
                "Lock a handle before the next insert or eviction."
            )

    def _is_there(self, handle: CacheHandle) -> bool:
        return handle.node.parent is not None

    def _check_new(self, pages: list[int]) -> None:
        page = next((page for page in pages if page in self._by_page), None)
        if page is not None:
            raise ValueError(
                f"pages must not be in the cache yet, got page {page}, which is there under other tokens. "
                "Commit the same token ids for pages that sequences share."
            )
        if len(set(pages)) < len(pages):
            page = next(page for number, page in enumerate(pages) if page in pages[:number])
            raise ValueError(f"pages must name each page once, got page {page} twice.")

    def _checked_pages(self, ids: TokenArray, pages: PageIds) -> PageArray:
        array = as_page_array(pages)
        if array.shape[0] != ids.shape[0] // self.page_size:
            raise ValueError(
                f"pages must have shape [{ids.shape[0] // self.page_size}] for {ids.shape[0]} tokens "
                f"(page_size {self.page_size}), got {list(array.shape)}."
            )
        self._check_range(array)
        return array.astype(np.int32, copy=False)

    def _check_range(self, pages: PageArray) -> None:
        if pages.size and (pages.min() < 0 or pages.max() > 2**31 - 2):
            raise ValueError(f"pages must be in 0..2**31 - 2, got {pages.min()}..{pages.max()}.")

    def _forget_all(self) -> None:
        for node in self._by_page.values():
            node.parent = None
