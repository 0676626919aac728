"""How the pages of one sequence change hands: reserved, copied on write, published, locked, given back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.compare_key import common_prefix_len
from .allocator import PageArray
from .ledger import PageLedger
from .prefix_cache import CacheHandle, Namespace

__all__ = ["SequenceBooks"]

_NO_PAGES = np.empty(0, np.int32)


class SequenceBooks:
    """The row of a sequence and its lock; management/sequence.py has the intervals. Callers hold the manager's lock.

    Owns: a count of each page it names from the end of its lock on. Pages under the lock are the prefix cache's.
    """

    def __init__(
        self,
        ledger: PageLedger,
        namespace: Namespace,
        tokens: npt.NDArray[Any],
        pages: PageArray,
        handle: CacheHandle | None,
        window: int | None,
        num_expected: int,
    ) -> None:
        """`handle` is locked; pages beyond it are retained. num_expected: tokens to make room for."""
        self._ledger = ledger
        self._rows = ledger.rows
        self._namespace = namespace
        self._cache, self._max_cached_pages = ledger.cache_of(namespace)
        self._window = window
        self._row = self._rows.add(tokens, pages, num_expected)
        self._rows.window[self._row] = window or 0
        self._priority = 0
        self._handle: CacheHandle | None = None
        self._set_handle(handle)

    @property
    def _num_tokens(self) -> int:
        return self._rows.num_tokens.item(self._row)

    @property
    def _num_committed(self) -> int:
        return int(self._rows.tokens.size.item(self._row))

    @property
    def _num_pages(self) -> int:
        return self._rows.pages.size.item(self._row)

    @property
    def _lock_pages(self) -> int:
        return 0 if self._handle is None else self._handle.num_tokens // self._ledger.page_size

    def _page_view(self, start: int = 0, stop: int | None = None) -> PageArray:
        return self._rows.pages.view(self._row, start, stop)

    def _own_pages(self, stop: int | None = None) -> PageArray:
        """The pages that it has a count of, up to position `stop`: a view."""
        first = max(self._lock_pages, self._rows.first_page.item(self._row))
        return self._page_view(first, max(first, self._num_pages if stop is None else stop))

    def _pages_to_add(self, num_tokens: int) -> tuple[int, bool]:
        """New pages that `num_tokens` more tokens need, and whether the last page must be replaced by a copy too."""
        page_size, num_pages, length = self._ledger.page_size, self._num_pages, self._num_tokens
        num_new = -(-(length + num_tokens) // page_size) - num_pages
        return num_new, length % page_size != 0 and self._is_last_page_of_others()

    def _is_last_page_of_others(self) -> bool:
        last = self._num_pages - 1
        return last < self._lock_pages or self._ledger.is_shared(self._page_view(last).item(0))

    def _num_kept_free(self) -> int:
        """Pages that this sequence may not take: those of the watermark, as long as it has no slots of its own."""
        return self._ledger.num_kept_free if self._rows.is_new.item(self._row) else 0

    def _fits(self, num_tokens: int) -> bool:
        num_new, must_copy = self._pages_to_add(num_tokens)
        return self._ledger.can_obtain(num_new + must_copy, self._num_kept_free())

    def _append(self, num_tokens: int) -> npt.NDArray[np.int64]:
        """Reserves, and returns the slots."""
        ledger, rows, row = self._ledger, self._rows, self._row
        num_new, must_copy = self._pages_to_add(num_tokens)
        if num_new or must_copy:
            pages = ledger.obtain(num_new + must_copy, self._num_kept_free())
            if must_copy:
                self._copy_last_page(pages)
                pages = pages[1:]
            rows.pages.extend(row, pages)
        start = self._num_tokens
        rows.num_tokens[row] = start + num_tokens
        rows.changed(row)
        rows.is_new[row] = False
        return self._slots(start, num_tokens)

    def _slots(self, start: int, num_tokens: int) -> npt.NDArray[np.int64]:
        page_size = self._ledger.page_size
        first, offset = divmod(start, page_size)
        bases = self._page_view(first).astype(np.int64)
        bases *= page_size
        if page_size == 1:
            return bases
        slots = np.add.outer(bases, np.arange(page_size)).reshape(-1)
        return slots[offset : offset + num_tokens]

    def _copy_last_page(self, obtained: PageArray) -> None:
        """Puts a copy of the last page, on obtained[0], in its place; gives `obtained` back if the copy fails."""
        try:
            self._ledger.copy_pages([(self._page_view(self._num_pages - 1).item(0), obtained.item(0))])
        except BaseException:
            self._ledger.allocator.free(obtained)
            raise
        self._replace_last_page(obtained[:1])

    def _replace_last_page(self, page: PageArray) -> None:
        """Names `page` [1], which holds a copy, in place of the last page, which others have too."""
        ledger, last = self._ledger, self._num_pages - 1
        shared = self._page_view(last).copy()
        was_locked = last < self._lock_pages
        self._rows.pages.put(self._row, last, page)
        if was_locked:
            self._lock_up_to(last * ledger.page_size)
        else:
            ledger.allocator.release_distinct(shared)

    def _check_as_forks_committed(self, new_ids: npt.NDArray[Any]) -> None:
        """Refuses other ids than a fork has published already for a page that both name."""
        committed = self._num_committed
        if self._cache is None or self._handle is None or self._handle.num_tokens <= committed:
            return
        known = self._cache.locked_tokens(self._handle, committed)[: new_ids.shape[0]]
        differs = known != new_ids[: known.shape[0]]
        if differs.any():
            position = int(differs.argmax())
            raise ValueError(
                f"token_ids must be those that a fork committed for the same pages, got {new_ids[position]} instead of "
                f"{known[position]} at position {committed + position}. Fork before the tokens are appended."
            )

    def _commit(self, new_ids: npt.NDArray[Any]) -> None:
        # The ids are put behind the committed ones but do not count until publishing them, which can refuse, is done.
        rows, row, committed = self._rows, self._row, self._num_committed
        rows.put_tokens(row, committed, new_ids)
        self._publish_full_pages(committed + new_ids.shape[0])
        rows.tokens.size[row] = committed + new_ids.shape[0]
        self._give_back_behind_window()

    def _publish_full_pages(self, num_committed: int) -> None:
        """Publishes what is full with `num_committed` ids, unless a window moves on over it."""
        rows, row, page_size = self._rows, self._row, self._ledger.page_size
        full = num_committed // page_size * page_size
        if full > rows.published.item(row) and (self._window is None or num_committed <= self._window):
            self._publish(full)
            rows.published[row] = full

    def _publish(self, stop: int) -> None:
        """Offers tokens [end of the lock, stop) to the prefix cache, and locks what it took.

        Starts at the lock, not at `published`: duplicates in between are taken when the cache has dropped its own.
        """
        ledger, cache, handle, page_size = self._ledger, self._cache, self._handle, self._ledger.page_size
        start = 0 if handle is None else handle.num_tokens
        stop = start + self._room_in_cache((stop - start) // page_size) * page_size
        if cache is None or start >= stop:
            return
        ids, pages = (
            self._rows.tokens.view(self._row, start, stop),
            self._page_view(start // page_size, stop // page_size),
        )
        if handle is None:
            result = cache.insert(ids, pages, self._namespace, only_new=True, priority=self._priority)
        else:
            result = cache.extend(handle, ids, pages, only_new=True, priority=self._priority)
        if result.num_cached == 0:
            self._move_lock(result.handle)
            if ledger.allocator.num_extra_owners and (ledger.allocator.owner_counts_of(pages) > 1).any():
                self._lock_for_forks(result.handle)
                ledger.hand_over(pages)

    def _room_in_cache(self, num_pages: int) -> int:
        """How many of `num_pages` new pages the namespace may have in its cache, what is evicted for them included."""
        cache, limit = self._cache, self._max_cached_pages
        if cache is None or limit is None:
            return num_pages
        missing = cache.num_cached_pages + num_pages - limit
        if missing > 0:
            self._ledger.evict_from(cache, missing)
        return min(num_pages, max(0, limit - cache.num_cached_pages))

    def _publish_behind_duplicates(self) -> PageArray:
        """Before a close: leaves the cache what it does not have, on top of its own pages for what it has.

        Returns the pages that are still this sequence's then.
        """
        ledger, rows, page_size = self._ledger, self._rows, self._ledger.page_size
        published = rows.published.item(self._row)
        if self._cache is None or published <= rows.lock_tokens.item(self._row) or rows.first_page.item(self._row):
            return self._own_pages()
        candidates = self._own_pages(published // page_size)
        # A page that a fork names stays unpublished: the fork does not lock it, and publishes it itself.
        is_mine = ledger.allocator.owner_counts_of(candidates) == 1
        if not is_mine.all():
            return self._own_pages()
        stop = self._lock_pages + self._room_in_cache(candidates.shape[0])
        ids, pages = rows.tokens.view(self._row, 0, stop * page_size), self._page_view(0, stop)
        result = self._cache.insert(ids, pages, self._namespace, priority=self._priority)
        num_dropped = max(0, min(result.num_cached // page_size, stop) - self._lock_pages)
        own, taken = self._own_pages(), max(0, stop - self._lock_pages)
        return np.concatenate([own[:num_dropped], own[taken:]])

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

    def _cut(self, num_tokens: int) -> None:
        """Forgets the tokens from `num_tokens` on, and gives back pages that held only those."""
        ledger, rows, row, page_size = self._ledger, self._rows, self._row, self._ledger.page_size
        kept = -(-num_tokens // page_size)
        own = self._own_pages()
        released = own[max(0, kept - (self._num_pages - own.shape[0])) :].copy()
        rows.pages.truncate(row, kept)
        rows.num_tokens[row] = num_tokens
        if num_tokens < self._num_committed:
            rows.tokens.truncate(row, num_tokens)
            rows.published[row] = min(rows.published.item(row), num_tokens // page_size * page_size)
        # A last page that is cut inside and in the cache is still named, so it stays locked until append replaces it.
        self._lock_up_to(kept * page_size)
        ledger.allocator.release_distinct(released)
        rows.changed(row)

    def _give_back_behind_window(self) -> None:
        """Gives back pages that no later token sees; the positions of the others stay."""
        if self._window is None:
            return
        rows, row = self._rows, self._row
        first = rows.first_page.item(row)
        stop = min(max(0, self._num_committed - self._window + 1) // self._ledger.page_size, self._num_pages)
        if stop <= first:
            return
        released = self._own_pages(stop).copy()
        rows.pages.put(row, first, np.full(stop - first, -1, np.int32))
        rows.first_page[row] = stop
        if stop >= self._lock_pages:
            self._move_lock(None)
        self._ledger.allocator.release_distinct(released)
        rows.changed(row)

    def _give_back_all(self, pages: PageArray) -> None:
        """Unlocks, releases `pages`, which are those it has a count of, and names none."""
        rows, row = self._rows, self._row
        released = pages.copy()
        rows.pages.clear(row)
        rows.first_page[row] = 0
        self._move_lock(None)
        if released.shape[0]:
            self._ledger.allocator.release_distinct(released)
        rows.changed(row)

    def _lock_up_to(self, num_tokens: int) -> None:
        """Takes the end of the lock back to `num_tokens` where it reaches further."""
        if self._cache is None or self._handle is None or self._handle.num_tokens <= num_tokens:
            return
        self._move_lock(self._cache.ancestor(self._handle, num_tokens) if num_tokens else None)

    def _move_lock(self, handle: CacheHandle | None) -> None:
        """Locks before it unlocks, so that what both cover is never evictable in between."""
        cache, old = self._cache, self._handle
        if cache is not None:
            if handle is not None:
                cache.lock(handle)
            if old is not None:
                cache.unlock(old)
        self._set_handle(handle)

    def _set_handle(self, handle: CacheHandle | None) -> None:
        self._handle = handle
        self._rows.lock_tokens[self._row] = 0 if handle is None else handle.num_tokens
