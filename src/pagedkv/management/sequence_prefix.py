"""What a sequence gives to the prefix cache: full pages as they are committed, and what was left over at its close."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.compare_key import common_prefix_len
from .allocator import PageArray
from .prefix_cache import EMPTY_HANDLE, CacheHandle, InsertResult, PrefixCache
from .sequence_pages import SequencePages

__all__ = ["SequencePrefix"]


class SequencePrefix(SequencePages):
    """The committed tokens of a sequence; management/sequence.py has the intervals."""

    def _commit(self, new_ids: npt.NDArray[Any]) -> None:
        """Names the next reserved tokens, and publishes what is full then."""
        rows, row = self._rows, self._row
        committed = rows.tokens.size.item(row)
        rows.put_tokens(row, committed, new_ids)
        rows.tokens.size[row] = committed + len(new_ids)
        try:
            self._publish_full_pages()
        except Exception:
            rows.tokens.size[row] = committed
            raise
        if self._window is not None:
            self._give_back_behind_window()

    def _check_as_forks_committed(self, new_ids: npt.NDArray[Any]) -> None:
        """Refuses other ids than a fork has for a page that both name, when it is published or would be now."""
        rows, row = self._rows, self._row
        committed, num_locked = rows.tokens.size.item(row), rows.lock_tokens.item(row)
        has_forks = self._budget.allocator.num_extra_owners
        if self._cache is None or not (has_forks or num_locked > committed):
            return
        if num_locked > committed:
            known = self._cache.locked_tokens(self._handle or EMPTY_HANDLE, committed)[: num_locked - committed]
            self._check_equal(known, new_ids, committed)
        page_size = self._ledger.page_size
        full = (committed + new_ids.shape[0]) // page_size * page_size
        first = max(num_locked, rows.first_page.item(row) * page_size)
        if not has_forks or full <= first:
            return
        pages = self._page_view(first // page_size, full // page_size)
        if not (self._budget.allocator.owner_counts_of(pages) > 1).any():
            return
        ids = np.concatenate([rows.tokens.view(row, 0, committed), new_ids])[first:]
        for fork in self._ledger.live.values():
            if fork is not self and fork._row >= 0 and fork._cache is self._cache:
                num_shared = common_prefix_len(fork._page_view(first // page_size), pages) * page_size
                known = fork._rows.tokens.view(fork._row)[first : first + num_shared]
                self._check_equal(known, ids, first)

    @staticmethod
    def _check_equal(known: npt.NDArray[Any], ids: npt.NDArray[Any], start: int) -> None:
        length = min(known.shape[0], ids.shape[0])
        differs = known[:length] != ids[:length]
        if differs.any():
            position = int(differs.argmax())
            raise ValueError(
                f"token_ids must be those that a fork committed for the same pages, got {ids[position]} instead of "
                f"{known[position]} at position {start + position}. Fork before the tokens are appended."
            )

    def _publish_full_pages(self) -> None:
        """Publishes what is full, unless a window moves on over it that the cache does not know of."""
        rows, row, page_size = self._rows, self._row, self._ledger.page_size
        num_committed = rows.tokens.size.item(row)
        full = num_committed - num_committed % page_size
        if full <= rows.published.item(row) or self._cache is None:
            return
        if self._window is None or self._ledger.window is not None or num_committed <= self._window:
            self._publish(self._cache, full)
            rows.published[row] = full

    def _publish(self, cache: PrefixCache, stop: int) -> None:
        """Offers tokens [end of the lock, stop) to the prefix cache, and locks what it took.

        Starts at the lock, not at `published`: duplicates in between are taken when the cache has dropped its own.
        """
        page_size = self._ledger.page_size
        start = self._rows.lock_tokens.item(self._row)
        if self._window is not None:
            start = max(start, self._rows.first_page.item(self._row) * page_size)
        if self._max_cached_pages is not None:
            num_known, stop = self._room_in_cache(cache, stop)
            if num_known > start:
                return
        allocator = self._budget.allocator
        if allocator.num_extra_owners and self._ledger.window is not None:
            # A fork could not lock its part of what a window sees at the end: shared pages wait until one has them.
            is_shared = allocator.owner_counts_of(self._page_view(start // page_size, stop // page_size)) > 1
            stop = start + int(np.argmax(np.append(is_shared, True))) * page_size
        if start >= stop:
            return
        result = self._offer(cache, stop, only_new=True)
        taken_to = result.handle.num_tokens
        if taken_to <= start:
            return
        if result.num_cached and not cache.holds(self._page_view(start // page_size, start // page_size + 1))[0]:
            return
        self._move_lock(result.handle)
        if allocator.num_extra_owners:
            pages = self._page_view(start // page_size, taken_to // page_size)
            if (allocator.owner_counts_of(pages) > 1).any():
                self._lock_for_forks(result.handle)
                self._budget.hand_over(pages)

    def _offer(self, cache: PrefixCache, stop: int, only_new: bool) -> InsertResult:
        """Gives the cache the tokens [end of the lock, stop); counts are of these."""
        rows, row, page_size, priority = self._rows, self._row, self._ledger.page_size, self._priority
        handle, start = self._handle, rows.lock_tokens.item(row)
        if (
            handle is not None
            and handle.num_tokens == start
            and (self._window is None or rows.first_page.item(row) * page_size <= start)
        ):
            ids, pages = rows.tokens.view(row, start, stop), rows.pages.view(row, start // page_size, stop // page_size)
            return cache.extend(handle, ids, pages, only_new=only_new, priority=priority)
        ids, pages = rows.tokens.view(row, 0, stop), rows.pages.view(row, 0, stop // page_size)
        if start:
            # Only a cache with windows: its own pages are not offered, as are not those behind the window.
            pages = pages.copy()
            pages[: start // page_size] = -1
        result = cache.insert(ids, pages, self._namespace, only_new=only_new, priority=priority)
        return InsertResult(max(0, result.num_cached - start), result.handle)

    def _room_in_cache(self, cache: PrefixCache, stop: int) -> tuple[int, int]:
        """How many of the tokens [0, stop) a limited cache has, and up to where it has room for them.

        Makes room by evicting older pages of the namespace for what is not there.
        """
        limit, page_size = self._max_cached_pages, self._ledger.page_size
        assert limit is not None  # asked of limited caches alone
        match = cache.match(self._rows.tokens.view(self._row, 0, stop), self._namespace)
        missing = cache.num_cached_pages + (stop - match.num_tokens) // page_size - limit
        if missing > 0:
            cache.lock(match.handle)
            try:
                self._budget.evict_from(cache, missing)
            finally:
                cache.unlock(match.handle)
        room = max(0, limit - cache.num_cached_pages) * page_size
        return match.num_tokens, min(stop, match.num_tokens + room)

    def _publish_behind_duplicates(self) -> PageArray:
        """Before a close: leaves the cache what it does not have, on top of its own pages for what it has.

        Returns the pages that are still this sequence's then.
        """
        rows, page_size, cache = self._rows, self._ledger.page_size, self._cache
        start, stop = rows.lock_tokens.item(self._row), rows.published.item(self._row)
        if cache is None or stop <= start or rows.first_page.item(self._row):
            return self._own_pages()
        allocator = self._budget.allocator
        # A page that a fork names stays unpublished: the fork does not lock it, and publishes it itself.
        if allocator.num_extra_owners and (allocator.owner_counts_of(self._own_pages(stop // page_size)) > 1).any():
            return self._own_pages()
        if self._max_cached_pages is not None:
            _, stop = self._room_in_cache(cache, stop)
            if stop <= start:
                return self._own_pages()
        result = self._offer(cache, stop, only_new=False)
        own, num_known = self._own_pages(), result.num_cached // page_size
        return np.concatenate([own[:num_known], own[(result.handle.num_tokens - start) // page_size :]])

    def _lock_for_forks(self, handle: CacheHandle) -> None:
        """Extends the locks of sequences that name pages which were just published: forks made before the commit."""
        cache, page_size = self._cache, self._ledger.page_size
        for fork in self._ledger.live.values():
            if fork is self or cache is None or fork._row < 0 or fork._cache is not cache:
                continue
            start = fork._rows.first_page.item(fork._row)
            stop = handle.num_tokens // page_size
            num_shared = start + common_prefix_len(fork._page_view(start), self._page_view(start, max(start, stop)))
            if start < num_shared and num_shared > fork._lock_pages:
                fork._move_lock(cache.ancestor(handle, num_shared * page_size))
                fork._rows.changed(fork._row)
