"""Gives beams pages of their own: free ones, or those used longest ago, with copies of what was shared."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .tile_buffers import Tile, TileBuffers
from .tile_ledger import TileLedger
from .tile_page_table import Indices
from .tile_span import Flags, TouchedTiles

__all__ = ["OnEvict", "TileOwner"]

# Beams that share the tile, its head and number, copies of its keys and of its values.
OnEvict = Callable[[list[int], int, int, Tile, Tile], object]


class TileOwner:
    """The one place where pages are taken, copied and evicted; the caller holds the lock of the cache.

    is_announcing: whether on_evict is being called; all books hold then.
    """

    def __init__(self, ledger: TileLedger, buffers: TileBuffers, on_evict: OnEvict | None) -> None:
        self._ledger = ledger
        self._buffers = buffers
        self._on_evict = on_evict
        self.is_announcing = False
        self.num_evictions = 0

    def own_tile(self, beam: int, head: int, tile: int) -> int:
        """`own` of one tile, whose content is left as it is if it is new."""
        is_whole = np.array([True])
        return int(self.own(np.array([beam]), np.array([head]), np.array([tile]), is_whole)[0])

    def own_all_heads(self, touched: TouchedTiles) -> Indices:
        """`own` of m tiles of every head: pages [m * num_heads]."""
        ledger, (beams, tiles, is_whole) = self._ledger, touched
        num_heads = ledger.table.num_heads
        pages: Indices = ledger.table.entries[beams, :, tiles].reshape(-1).astype(np.int64)
        # Most steps of a decoder write into tiles that are there, are not shared and that nobody holds.
        if pages.min() >= 0 and ledger.num_names[pages].max() == 1 and not ledger.num_pins[pages].any():
            return pages
        heads = np.tile(np.arange(num_heads), beams.size)
        return self.own(np.repeat(beams, num_heads), heads, np.repeat(tiles, num_heads), np.repeat(is_whole, num_heads))

    def own(self, beams: Indices, heads: Indices, tiles: Indices, is_whole: Flags) -> Indices:
        """The pages of m tiles, no tile twice, each its beam's to write: copies of shared ones, new where none was.

        is_whole: of which tiles the caller writes all tokens; the tokens of other new ones become zero.
        Raises:   OutOfPagesError, and whatever on_evict raises; then nothing has changed.
        """
        ledger = self._ledger
        pages = ledger.table.entries[beams, heads, tiles].astype(np.int64)
        lacking = ledger.lacking(pages, beams)
        if not lacking.size:
            return pages
        victims = ledger.victims(lacking.size, kept=pages[pages >= 0])
        self._announce(victims)
        ledger.is_sound = False
        ledger.evict(victims)
        self.num_evictions += victims.size
        taken, old = ledger.take(lacking.size), pages[lacking]
        self._buffers.copy(old[old >= 0], taken[old >= 0])
        self._buffers.blank(taken[(old < 0) & ~is_whole[lacking]])
        ledger.name(beams[lacking], heads[lacking], tiles[lacking], taken)
        ledger.is_sound = True
        pages[lacking] = taken
        return pages

    def _announce(self, victims: Indices) -> None:
        if self._on_evict is None or not victims.size:
            return
        self.is_announcing = True
        try:
            for page in victims.tolist():
                head, tile = divmod(int(self._ledger.tile_of[page]), self._ledger.table.num_tiles)
                key, value = self._buffers.read(page, "k"), self._buffers.read(page, "v")
                self._on_evict(self._ledger.beams_of(page), head, tile, key, value)
        finally:
            self.is_announcing = False
