"""Who names which page of a tile cache, who holds it, and which was used longest ago."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import OutOfPagesError
from .tile_page_table import Indices, PageIds, TilePageTable
from .tile_use import TileUse

__all__ = ["TileLedger"]


class TileLedger:
    """The books of `num_pages` pages; every page is free, named by beams of one (head, tile), or only pinned.

    num_names:   how many beams have the page in the table: more than one share it.
    num_pins:    how many hold it. A pin is on a page, not on a tile: a page that is pinned stays as it is when no beam
                 names it any more, and becomes free when the last pin goes.
    num_writers: how many of the pins write to it. Such a page has one name at most.
    tile_of:     head * num_tiles + tile of the page, -1 for a free one.
    use:         when each was last used; the one used longest ago is evicted first.

    Nothing here is checked or locked: `TileCache` does both.
    """

    def __init__(self, num_pages: int, table: TilePageTable) -> None:
        self.num_pages = num_pages
        self.table = table
        self.num_names = np.zeros(num_pages, np.int32)
        self.num_pins = np.zeros(num_pages, np.int32)
        self.num_writers = np.zeros(num_pages, np.int32)
        self.tile_of = np.full(num_pages, -1, np.int64)
        self.use = TileUse(num_pages)
        # The end is taken first: a fresh cache gives page 0, then 1.
        self.free = list(range(num_pages - 1, -1, -1))

    def lacking(self, pages: Indices) -> Indices:
        """Which entries of `pages`, -1 for none, are not a page that one beam alone names.

        Where all beams that share a page are in `pages`, the first of them keeps it.
        """
        lacks = (pages < 0) | (self.num_names[pages] > 1)
        entries = np.flatnonzero(lacks)
        if not entries.size:
            return entries
        shared, first, counts = np.unique(pages[entries], return_index=True, return_counts=True)
        lacks[entries[first[(shared >= 0) & (counts == self.num_names[shared])]]] = False
        return np.flatnonzero(lacks)

    def victims(self, num_needed: int, kept: Indices) -> Indices:
        """The pages that must go for `num_needed` to be free, the one used longest ago first; `kept` may not go.

        Raises: OutOfPagesError when too few pages are neither pinned nor kept.
        """
        num_victims = num_needed - len(self.free)
        if num_victims <= 0:
            return np.empty(0, np.int64)
        may_go = (self.num_names > 0) & (self.num_pins == 0)
        found = self.use.oldest(num_victims, may_go, kept)
        if found.size < num_victims:
            may_go[kept] = False
            num_evictable = int(np.count_nonzero(may_go))
            beams_pinning = self._num_beams_pinning()
            raise OutOfPagesError(num_needed, len(self.free), num_evictable, self.num_pinned, beams_pinning)
        return found

    def beams_of(self, page: int) -> list[int]:
        """The beams that name a page."""
        head, tile = divmod(int(self.tile_of[page]), self.table.num_tiles)
        return [int(beam) for beam in np.flatnonzero(self.table.entries[:, head, tile] == page)]

    def evict(self, pages: Indices) -> None:
        """Takes all names from pages that nobody pins, and frees them."""
        heads, tiles = np.divmod(self.tile_of[pages], self.table.num_tiles)
        beams, which = np.nonzero(self.table.entries[:, heads, tiles] == pages)
        self.table.write_batch(beams, heads[which], tiles[which], -1)
        self.num_names[pages] = 0
        self._free(pages)

    def take(self, count: int) -> Indices:
        """`count` pages off the free list, still without a name."""
        taken = self.free[-count:][::-1] if count else []
        del self.free[len(self.free) - count :]
        return np.array(taken, np.int64)

    def give_back(self, pages: Indices) -> None:
        """Undoes `take`."""
        self._free(pages)

    def name(self, beams: Indices, heads: Indices, tiles: Indices, pages: Indices) -> None:
        """Gives n tiles of beams, no tile twice, a page of their own each, in place of the pages that they had."""
        before = self.table.entries[beams, heads, tiles]
        self.table.write_batch(beams, heads, tiles, pages)
        self.tile_of[pages] = heads * self.table.num_tiles + tiles
        self.num_names[pages] = 1
        self.forget(before[before >= 0])

    def forget(self, pages: PageIds) -> None:
        """Takes one name from a page for each time it stands in `pages`; frees those that nobody names or pins."""
        np.subtract.at(self.num_names, pages, 1)
        self._free_unheld(self.distinct(pages))

    def rename(self, num_names: PageIds) -> None:
        """Takes new counts of names after rows of the table were moved; frees pages that nobody names or pins."""
        before = np.flatnonzero(self.num_names)
        self.num_names[:] = num_names
        self._free_unheld(before)

    def distinct(self, pages: PageIds) -> Indices:
        """Each page of `pages` once. Marking them takes a twentieth of the time of np.unique for 4,096 pages."""
        marks = np.zeros(self.num_pages, np.bool_)
        marks[pages] = True
        return np.flatnonzero(marks)

    def count_names(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
        """How often rows of a table name each page, [num_pages]."""
        return np.bincount(rows[rows >= 0], minlength=self.num_pages)

    def reset(self, tile_of: Indices, pages: Indices) -> None:
        """Starts anew from m names in the table, of tile tile_of[i] on page pages[i], the latest used last."""
        self.tile_of[:] = -1
        self.tile_of[pages] = tile_of
        self.num_names[:] = np.bincount(pages, minlength=self.num_pages)
        self.use.touch(pages)
        self.free = np.flatnonzero(self.num_names == 0)[::-1].tolist()

    def pin(self, pages: PageIds | int, *, writes: bool = False) -> None:
        """Holds pages, no page twice."""
        self.num_pins[pages] += 1
        if writes:
            self.num_writers[pages] += 1

    def unpin(self, pages: PageIds, *, writes: bool = False) -> None:
        """Lets pages go that `pin` holds; frees those that nobody names any more."""
        self.num_pins[pages] -= 1
        if writes:
            self.num_writers[pages] -= 1
        self.use.let_go(pages)
        self._free_unheld(pages)

    @property
    def num_pinned(self) -> int:
        """Pages with a pin."""
        return int(np.count_nonzero(self.num_pins))

    def _num_beams_pinning(self) -> int:
        entries = self.table.entries
        return int(((self.num_pins[entries] > 0) & (entries >= 0)).any(axis=(1, 2)).sum())

    def _free_unheld(self, pages: PageIds) -> None:
        unheld = pages[(self.num_names[pages] == 0) & (self.num_pins[pages] == 0)]
        if unheld.size:
            self._free(unheld)

    def _free(self, pages: PageIds) -> None:
        self.tile_of[pages] = -1
        self.free.extend(pages[::-1].tolist())
