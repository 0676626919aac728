"""What changes in a hashed cache when a token sees only the last tokens before it.

With a window of W tokens and pages of P, a prefix of n tokens (whole pages) is of use when the pages that hold any of
its last W - 1 tokens are there. These are the pages it *needs*: the last ceil((W - 1) / P), or all if it has fewer.

    page positions   [0, n // P - window_pages)       not looked at: cached, or ghosts, and page -1 in results
                     [n // P - window_pages, n // P)  needed: found by a match, protected by a lock, used by both

A page can leave whatever continues it. It is a ghost then, whose tokens and digest stay as long as a cached page
continues it, so that this can be found. Each page is its own unit of use; of equals the one further from the beginning
goes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .allocator import PageArray
from .eviction import EvictionPolicy
from .hashed_books import SERIAL_BITS
from .hashed_events import WindowEventLog
from .hashed_page import WindowPage
from .hashed_spans import lock_span, unlock_span
from .hashed_uses import WindowUses
from .page_hash import PageHash
from .prefix_cache import EMPTY_HANDLE, CacheHandle, InsertResult, MatchResult, Namespace, namespace_key
from .token_ids import TokenArray

__all__ = ["WindowBooks"]


class WindowBooks(WindowUses):
    """The books of a cache that may have a window: whole prefixes, uses page by page, and locks of the last pages."""

    def __init__(self, page_size: int, policy: EvictionPolicy, page_hash: PageHash, window: int | None) -> None:
        super().__init__(page_size, policy, page_hash, has_window=window is not None)
        self._window = window
        self._window_pages = 0 if window is None else -(-(window - 1) // page_size)

    def _match_in_window(self, ids: TokenArray, namespace: Namespace) -> MatchResult:
        root = self._roots.get(namespace_key(namespace)) or self._new_root(namespace)
        chain: list[WindowPage] = self._table.chain(root, ids)
        if self._window_pages:
            num_pages = self._longest_whole(chain)
        else:
            # Whatever was asked needs nothing. A handle has its own chain, which the table does not know.
            unknown = ids[len(chain) * self.page_size :]
            chain += self._ghosts(chain[-1] if chain else root, unknown, are_filed=False)
            num_pages = len(chain)
        first = max(0, num_pages - self._window_pages)
        needed = chain[first:num_pages]
        self._use_pages(needed, num_hits=1)
        pages = np.full(num_pages, -1, np.int32)
        pages[first:] = [page.page for page in needed]
        handle = self._handle_now(chain[num_pages - 1] if num_pages else root)
        return MatchResult(handle.num_tokens, pages, handle)

    def _longest_whole(self, chain: list[WindowPage]) -> int:
        """How many pages the longest prefix has whose needed pages are there. Cost: a look at each page at most."""
        end = len(chain)
        while end:
            first, position = max(0, end - self._window_pages), end - 1
            while position >= first and chain[position].page >= 0:
                position -= 1
            if position < first:
                break
            end = position
        return end

    def _insert_in_window(
        self, start: WindowPage, ids: TokenArray, pages: PageArray, only_new: bool, priority: int
    ) -> InsertResult:
        """Takes of `pages`, which are for the positions behind `start`, what management/hashed_cache.py says."""
        chain = self._table.chain(start, ids)
        num_cached = 0
        for page in chain:
            if page.page < 0:
                break
            num_cached += 1
        last = chain[num_cached - 1] if num_cached else start
        taken: list[WindowPage] = []
        offered = _num_given_back(pages)
        if not (only_new and offered < len(chain) and chain[offered].page >= 0):
            first, stop = self._positions_to_take(chain, num_cached, pages)
            if first < stop:
                taken = self._take(start, chain, ids, pages, first, stop, priority)
                last = taken[-1]
        self._use_pages(self._needed(last), priority=priority)
        if taken:
            self._offer_later(taken)
        return InsertResult(num_cached * self.page_size, self._handle_now(last))

    def _extend_in_window(
        self, handle: CacheHandle, ids: TokenArray, pages: PageArray, only_new: bool, priority: int
    ) -> InsertResult:
        if self._window_pages:
            return self._insert_in_window(handle.node, ids, pages, only_new, priority)
        start = self._filed(handle.node)
        try:
            return self._insert_in_window(start, ids, pages, only_new, priority)
        finally:
            self._forget(start)

    def _positions_to_take(self, chain: list[WindowPage], num_cached: int, pages: PageArray) -> tuple[int, int]:
        """Of the positions that `pages` are for: the first to be taken and the first behind them; equal for none."""
        first = max(num_cached, _num_given_back(pages))
        stop = pages.shape[0]
        if first < len(chain):
            stop = next((number for number in range(first, len(chain)) if chain[number].page >= 0), stop)
        if first > num_cached:
            # Behind positions that were given back, the pages up to a page that is there may be of no use.
            gap = range(max(num_cached, stop - self._window_pages), first)
            if not all(number < len(chain) and chain[number].page >= 0 for number in gap):
                stop = first
        return first, stop

    def _take(
        self,
        start: WindowPage,
        chain: list[WindowPage],
        ids: TokenArray,
        pages: PageArray,
        first: int,
        stop: int,
        priority: int,
    ) -> list[WindowPage]:
        """Puts pages[first:stop] at their positions behind `start`, of which `chain` is known; returns them."""
        page_ids: list[int] = pages[first:stop].tolist()
        self._check_new(page_ids)
        self._time += 1
        time, page_size = self._time, self.page_size
        taken = chain[first:stop]
        if stop > len(chain):
            known = len(chain)
            behind = self._ghosts(chain[-1] if chain else start, ids[known * page_size : stop * page_size])
            taken += behind[max(0, first - known) :]
        for page, number in zip(taken, page_ids, strict=True):
            page.page = number
            page.created = page.last_access = time
            page.num_hits, page.priority = 0, priority
        self._by_page.update(zip(page_ids, taken, strict=True))
        if isinstance(self.events, WindowEventLog):
            taken_ids = ids[first * page_size : stop * page_size]
            self.events.stored_at(taken[0], pages[first:stop], taken_ids, page_size)
        return taken

    def _needed(self, last: WindowPage) -> list[WindowPage]:
        """The pages that the prefix up to `last` needs, without locked ones if a use of these has no effect."""
        needed: list[WindowPage] = []
        while len(needed) < self._window_pages and last.parent is not None:
            if last.span is not None and self._is_plain_policy:
                break
            needed.append(last)
            last = last.parent
        return needed

    def _lock_in_window(self, page: WindowPage) -> None:
        self._num_locked_pages += lock_span(page, self._window_pages)

    def _unlock_in_window(self, page: WindowPage) -> None:
        freed = unlock_span(page, self._window_pages)
        self._num_locked_pages -= len(freed)
        # Those that are still locked are used when the last lock of them goes.
        self._use_pages(freed)
        if freed:
            self._offer_later(freed)

    def _is_whole(self, page: WindowPage, time: int) -> bool:
        """Whether the pages that the prefix up to `page` needs are there, and were at `time`."""
        num_left = self._window_pages
        while num_left and page.parent is not None:
            # All further ones are in the span of a locked page.
            if page.span is not None and page.span.newest <= time:
                return True
            if page.page < 0 or page.created > time:
                return False
            page = page.parent
            num_left -= 1
        return True

    def _is_there(self, handle: CacheHandle) -> bool:
        if self._window is None:
            return handle.node.parent is not None
        return self._is_whole(handle.node, handle.version >> SERIAL_BITS)

    def _ancestor_in_window(self, handle: CacheHandle, page: WindowPage) -> CacheHandle:
        num_tokens = (page.position + 1) * self.page_size
        if not self._is_whole(page, handle.version >> SERIAL_BITS):
            raise ValueError(
                f"num_tokens must be a prefix whose last {self._window_pages} pages, which its window needs, are still "
                f"cached, got {num_tokens}. Lock a handle of it while they are."
            )
        return handle._replace(node=page, num_tokens=num_tokens)

    def _handle_now(self, last: WindowPage) -> CacheHandle:
        """Says when, so that pages which left and came back since are told from what they were."""
        if last.parent is None:
            return EMPTY_HANDLE
        return CacheHandle(last, self._serial | self._time << SERIAL_BITS, (last.position + 1) * self.page_size)

    def _forget_all(self) -> None:
        if self._window is None:
            super()._forget_all()
            return
        self._to_offer.clear()
        for page in self._table.pages():
            page.page = -1

    def _check_range(self, pages: npt.NDArray[Any]) -> None:
        if self._window is None:
            super()._check_range(pages)
            return
        num_gone = _num_given_back(pages)
        given = pages[num_gone:]
        if given.size and (given.min() < 0 or given.max() > 2**31 - 2):
            raise ValueError(
                f"pages must be in 0..2**31 - 2, or -1 before all others, got {given.min()}..{given.max()} behind "
                f"{num_gone} of -1."
            )


def _num_given_back(pages: npt.NDArray[Any]) -> int:
    """How many pages at the beginning are -1."""
    if not pages.shape[0] or pages[0] != -1:
        return 0
    is_given = pages != -1
    return int(is_given.argmax()) if is_given.any() else pages.shape[0]
