"""Who names which page of a tile cache, who holds it, and which was used longest ago."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import OutOfPagesError
from .tile_page_table import Indices, PageIds, TilePageTable
from .tile_pins import NOBODY, SEVERAL, Held, TilePins
from .tile_use import TileUse

__all__ = ["TileLedger"]


class TileLedger:
    """The books of `num_pages` pages; every page is free, named by beams of one (head, tile), or only pinned.

    pins:        who holds which page. A pin is on a page, not on a tile: a page that is pinned stays as it is when no
                 beam names it any more, and becomes free when the last pin goes.
    num_names:   how many beams have the page in the table: more than one share it.
    num_pins:    how many hold it.
    num_writers: how many of the pins write to it. Such a page has one name at most.
    holder:      the beam that the pins of a page are for, NOBODY without pins, SEVERAL where they are or were for more
                 than one beam. A beam writes in place only what nobody holds for another beam.
    tile_of:     head * num_tiles + tile of the page, -1 for a free one.
    use:         when each was last used; the one used longest ago is evicted first.
    is_sound:    False while a change is under way. The table and the record of pins are the truth, and each of their
                 changes is one step: where a change was stopped, `settle` makes all the other books from these two.

    Nothing here is checked or locked: `TileCache` does both, and says when a change starts and ends.
    """

    def __init__(self, num_pages: int, table: TilePageTable) -> None:
        self.num_pages = num_pages
        self.table = table
        self.pins = TilePins()
        self.num_names = np.zeros(num_pages, np.int32)
        self.num_pins = np.zeros(num_pages, np.int32)
        self.num_writers = np.zeros(num_pages, np.int32)
        self.holder = np.full(num_pages, NOBODY, np.int64)
        self.tile_of = np.full(num_pages, -1, np.int64)
        self.use = TileUse(num_pages)
        # The end is taken first: a fresh cache gives page 0, then 1.
        self.free = list(range(num_pages - 1, -1, -1))
        self.is_sound = True

    def settle(self) -> None:
        """Takes off the pins of blocks that ended, and makes the books anew after a change that was stopped."""
        if self.is_sound and not self.pins.ended:
            return
        was_sound, self.is_sound = self.is_sound, False
        ended = self.pins.forget_ended()
        if was_sound:
            for held in ended:
                self.unpin(held)
        else:
            self.rebuild()
        self.is_sound = True

    def rebuild(self) -> None:
        """Makes the books from the table and the record of pins."""
        entries = self.table.entries
        self.table.mark_all()
        self.num_names[:] = self.count_names(entries)
        self.num_pins[:] = self.num_writers[:] = 0
        self.holder[:] = NOBODY
        for held in self.pins:
            self.pin(held)
        is_held = (self.num_names > 0) | (self.num_pins > 0)
        _, heads, tiles = np.nonzero(entries >= 0)
        self.tile_of[~is_held] = -1
        self.tile_of[entries[entries >= 0]] = heads * self.table.num_tiles + tiles
        self.free = np.flatnonzero(~is_held)[::-1].tolist()
        self.use.forget_order()

    def lacking(self, pages: Indices, beams: Indices) -> Indices:
        """Which entries of `pages`, -1 for none, are not a page that their beam may write in place.

        Such a page is named by that beam alone, and held for no other. Where all beams that share a page are in
        `pages`, the first of them that may keeps it.
        """
        is_others = (self.holder[pages] != NOBODY) & (self.holder[pages] != beams)
        lacks = (pages < 0) | is_others | (self.num_names[pages] > 1)
        entries = np.flatnonzero(lacks)
        if not entries.size:
            return entries
        entries = entries[np.argsort(is_others[entries], kind="stable")]
        shared, first, counts = np.unique(pages[entries], return_index=True, return_counts=True)
        keepers = entries[first[(shared >= 0) & (counts == self.num_names[shared])]]
        lacks[keepers[~is_others[keepers]]] = False
        return np.flatnonzero(lacks)

    def may_write(self, page: int, beam: int) -> bool:
        """Whether a beam that names a page may write it in place."""
        return bool(self.num_names[page] == 1 and self.holder[page] in (NOBODY, beam))

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

    def pin(self, held: Held) -> None:
        """Counts pins that are in the record."""
        pages, beams = held.pages, held.beams
        before = self.holder[pages]
        is_new = before == NOBODY
        # Most pages are held by one alone, and np.where takes longer than all the rest for a few pages.
        self.holder[pages] = beams if is_new.all() else np.where(is_new | (before == beams), beams, SEVERAL)
        self.num_pins[pages] += 1
        if held.writes:
            self.num_writers[pages] += 1

    def unpin(self, held: Held) -> None:
        """Counts pins no longer that are gone from the record; frees pages that nobody names any more."""
        num_left = self.num_pins[held.pages] - 1
        self.num_pins[held.pages] = num_left
        if held.writes:
            self.num_writers[held.pages] -= 1
        let_go = held.pages[num_left == 0]
        self.holder[let_go] = NOBODY
        self.use.let_go(let_go)
        self._free_unheld(let_go)

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
