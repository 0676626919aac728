"""The pages of one sequence: reserved, copied on write, locked in the prefix cache, given back.

Order: an interrupt may end any of this between two steps. What a row of the books says of its sequence is right at
       every moment once pages beyond its tokens are cut off; all else is made anew from that (management/settle.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .allocator import PageArray
from .ledger import PageLedger
from .prefix_cache import CacheHandle, Namespace

__all__ = ["SequencePages"]


class SequencePages:
    """The row of a sequence and its lock; management/sequence.py has the intervals. Callers hold the manager's lock.

    Owns: a count of each page it names from the end of its lock on. Pages under the lock are the prefix cache's.
    """

    _priority = 0
    _is_closing = False
    _counts_at_end = (0, 0)

    def __init__(
        self,
        ledger: PageLedger,
        namespace: Namespace,
        tokens: npt.NDArray[Any],
        pages: PageArray,
        handle: CacheHandle | None,
        window: int | None = None,
        num_expected: int = 0,
    ) -> None:
        """For the manager, which puts it among the live ones: what `handle` names is locked and pages beyond it are
        retained; this sequence gives both back.

        num_expected: tokens to make room for.
        """
        rows, num_tokens = ledger.rows, int(tokens.shape[0])
        self._ledger = ledger
        self._budget = ledger.budget
        self._rows = rows
        self._namespace = namespace
        self._cache, self._max_cached_pages = ledger.cache_of(namespace)
        self._window = window
        self._num_cached_tokens = num_tokens
        self._row = row = rows.add(tokens, pages, num_expected, -(-num_expected // ledger.page_size))
        rows.num_tokens[row] = rows.published[row] = num_tokens
        if window is not None:
            rows.window[row] = window
            rows.first_page[row] = np.count_nonzero(pages < 0)
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
    def _lock_tokens(self) -> int:
        """Tokens on pages of the prefix cache. Its lock may reach further, see `_lock_up_to`."""
        return self._rows.lock_tokens.item(self._row)

    @property
    def _lock_pages(self) -> int:
        return self._lock_tokens // self._ledger.page_size

    def _page_view(self, start: int = 0, stop: int | None = None) -> PageArray:
        return self._rows.pages.view(self._row, start, stop)

    def _own_pages(self, stop: int | None = None) -> PageArray:
        """The pages that it has a count of, up to position `stop`: a view."""
        first = max(self._lock_pages, self._rows.first_page.item(self._row))
        return self._page_view(first, max(first, self._num_pages if stop is None else stop))

    def _pages_to_add(self, num_tokens: int) -> tuple[int, bool]:
        """New pages that `num_tokens` more tokens need, and whether the last page must be replaced by a copy too."""
        rows, row, page_size = self._rows, self._row, self._ledger.page_size
        length = rows.num_tokens.item(row)
        num_new = -(-(length + num_tokens) // page_size) - rows.pages.size.item(row)
        return num_new, length % page_size != 0 and self._is_last_page_of_others()

    def _is_last_page_of_others(self) -> bool:
        last = self._num_pages - 1
        return last < self._lock_pages or self._budget.is_shared(self._page_view(last).item(0))

    def _num_kept_free(self) -> int:
        """Pages that this sequence may not take: those of the watermark, until it has had slots of its own."""
        return self._budget.num_kept_free if self._rows.is_new.item(self._row) else 0

    def _fits(self, num_tokens: int) -> bool:
        num_new, must_copy = self._pages_to_add(num_tokens)
        return self._budget.can_obtain(num_new + must_copy, self._num_kept_free())

    def _append(self, num_tokens: int, obtained: PageArray | None = None) -> npt.NDArray[np.int64]:
        """Reserves, and returns the slots. `obtained` are the pages to take, as many as `_pages_to_add` says."""
        rows, row = self._rows, self._row
        num_new, must_copy = self._pages_to_add(num_tokens)
        if num_new or must_copy:
            pages = obtained
            if pages is None:
                pages = self._budget.obtain(num_new + must_copy, self._num_kept_free())
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
        pages = self._page_view(first)
        if page_size == 1:
            return pages.astype(np.int64)
        return self._ledger.slots_of(pages)[offset : offset + num_tokens]

    def _copy_last_page(self, obtained: PageArray) -> None:
        """Puts a copy of the last page, on obtained[0], in its place; gives `obtained` back if the copy fails."""
        try:
            self._budget.copy_pages([(self._page_view(self._num_pages - 1).item(0), obtained.item(0))])
        except BaseException:
            self._budget.allocator.free(obtained)
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
            self._budget.allocator.release_distinct(shared)

    def _cut(self, num_tokens: int) -> None:
        """Forgets the tokens from `num_tokens` on, and gives back pages that held only those."""
        rows, row, page_size = self._rows, self._row, self._ledger.page_size
        kept = -(-num_tokens // page_size)
        own = self._own_pages()
        released = own[max(0, kept - (self._num_pages - own.shape[0])) :].copy()
        rows.num_tokens[row] = num_tokens
        if num_tokens < self._num_committed:
            rows.tokens.truncate(row, num_tokens)
            rows.published[row] = min(rows.published.item(row), num_tokens // page_size * page_size)
        rows.pages.truncate(row, kept)
        # A last page that is cut inside and in the cache is still named, so it stays locked until append replaces it.
        self._lock_up_to(kept * page_size)
        self._budget.allocator.release_distinct(released)
        rows.changed(row)
        self._num_cached_tokens = min(self._num_cached_tokens, rows.published.item(row))

    def _shortest(self) -> int:
        """Tokens that must be left so that none sees a page that the window gave back."""
        gone = self._rows.first_page.item(self._row) * self._ledger.page_size
        return gone + self._window - 1 if gone and self._window is not None else 0

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
        self._budget.allocator.release_distinct(released)
        rows.changed(row)

    def _give_back_all(self, pages: PageArray) -> None:
        """Unlocks, releases `pages`, which are those it has a count of, and names none."""
        rows, row = self._rows, self._row
        released = pages.copy()
        rows.pages.clear(row)
        rows.first_page[row] = 0
        self._move_lock(None)
        if released.shape[0]:
            self._budget.allocator.release_distinct(released)
        rows.changed(row)

    def _lock_up_to(self, num_tokens: int) -> None:
        """Takes the end of what it has on pages of the prefix cache back to `num_tokens` where it is further.

        The lock goes back with it, unless the cache keeps windows: what a shorter prefix needs begins earlier, where
        pages may be gone, and is protected as far as this sequence sees it by the lock that it has.
        """
        if self._cache is None or self._lock_tokens <= num_tokens:
            return
        if self._ledger.window is not None and num_tokens:
            self._rows.lock_tokens[self._row] = num_tokens
        else:
            assert self._handle is not None  # it has pages of the cache
            self._move_lock(self._cache.ancestor(self._handle, num_tokens) if num_tokens else None)

    def _move_lock(self, handle: CacheHandle | None) -> None:
        """Locks before it unlocks, so that what both cover is never evictable in between."""
        cache, old = self._cache, self._handle
        is_same = handle is not None and old is not None and handle[:2] == old[:2]
        if cache is not None and not is_same:
            if handle is not None:
                cache.lock(handle)
            if old is not None:
                cache.unlock(old)
        self._set_handle(handle)

    def _set_handle(self, handle: CacheHandle | None) -> None:
        self._handle = handle
        self._rows.lock_tokens[self._row] = 0 if handle is None else handle.num_tokens
