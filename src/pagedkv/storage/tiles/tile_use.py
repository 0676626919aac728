"""When each page of a tile cache was last used, and which were used longest ago."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .tile_page_table import Indices, PageIds

__all__ = ["TileUse"]

# A pass over 65,536 pages takes 0.7 ms, one over a queue of this length 0.02 ms.
_QUEUE_LENGTH = 4096


class _Queue(NamedTuple):
    """Pages, the one used longest ago first, when each was last used, and the time at which they were put in order."""

    pages: Indices
    times: Indices
    made_at: int


_EMPTY = _Queue(np.empty(0, np.int64), np.empty(0, np.int64), 0)


class TileUse:
    """A clock that grows with each use, and the time of the last use of every page.

    Using a page is one assignment, whole batches of pages are one too; order is made only when a page must be found.
    Then the pages used longest ago are queued, and a queued page counts for as long as its time is the one it was
    queued with: whatever is used later is younger than the whole queue.
    """

    def __init__(self, num_pages: int) -> None:
        # All different from the start, and older than any use.
        self.last_used = np.arange(-num_pages, 0)
        self.clock = 0
        self._queue = _EMPTY

    def touch(self, pages: PageIds) -> None:
        """Makes pages the most recently used, the last of them the most; a duplicate counts where it stands last."""
        # The clock goes first: no time is given twice, wherever an interrupt comes.
        now = self.clock
        self.clock = now + pages.size
        self.last_used[pages] = np.arange(now, now + pages.size)

    def touch_page(self, page: int) -> None:
        """Makes a page the most recently used one."""
        now = self.clock
        self.clock = now + 1
        self.last_used[page] = now

    def oldest(self, count: int, may_go: npt.NDArray[np.bool_], kept: Indices) -> Indices:
        """The `count` pages used longest ago among those that may go and are not kept, the oldest first; or fewer.

        may_go [num_pages] must grow only through `let_go` between two calls, apart from pages that were used since.
        """
        found = self._still_queued(may_go, kept)
        if found.size < count:
            self._fill_queue(np.flatnonzero(may_go), max(count + kept.size, _QUEUE_LENGTH))
            found = self._still_queued(may_go, kept)
        return found[:count]

    def let_go(self, pages: PageIds) -> None:
        """Says that pages may go which before might not: the queue was made without them if it is younger."""
        queue = self._queue
        if queue.pages.size and pages.size and self.last_used[pages].min() < queue.made_at:
            self.forget_order()

    def forget_order(self) -> None:
        """Has the next call of `oldest` look at all pages."""
        self._queue = _EMPTY

    def _still_queued(self, may_go: npt.NDArray[np.bool_], kept: Indices) -> Indices:
        pages, times, made_at = self._queue
        unused = self.last_used[pages] == times
        pages = pages[unused]
        self._queue = _Queue(pages, times[unused], made_at)
        counts = may_go[pages]
        if kept.size and pages.size:
            counts &= ~np.isin(pages, kept)
        found: Indices = pages[counts]
        return found

    def _fill_queue(self, pages: Indices, length: int) -> None:
        times = self.last_used[pages]
        if length < pages.size:
            oldest = np.argpartition(times, length - 1)[:length]
            pages, times = pages[oldest], times[oldest]
        order = np.argsort(times)
        self._queue = _Queue(pages[order], times[order], self.clock)
