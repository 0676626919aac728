"""Gives beams pages of their own: free ones, or those used longest ago, with copies of what was shared."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from .tile_buffers import Tile, TileBuffers
from .tile_ledger import TileLedger
from .tile_page_table import Indices

__all__ = ["OnEvict", "TileOwner"]

# Beams that share the tile, its head and number, copies of its keys and of its values.
OnEvict = Callable[[list[int], int, int, Tile, Tile], object]


class TileOwner:
    """The one place where pages are taken, copied and evicted; the caller holds the lock of the cache.

    announcing_thread: the thread that is inside of on_evict, None for none.
    """

    def __init__(self, ledger: TileLedger, buffers: TileBuffers, on_evict: OnEvict | None) -> None:
        self._ledger = ledger
        self._buffers = buffers
        self._on_evict = on_evict
        self.announcing_thread: int | None = None
        self.num_evictions = 0

    def own_tile(self, beam: int, head: int, tile: int) -> int:
        """`own` of one tile."""
        return int(self.own(np.array([beam]), np.array([head]), np.array([tile]))[0])

    def own_all_heads(self, beams: Indices, tiles: Indices) -> Indices:
        """`own` of m tiles of every head: pages [m * num_heads]."""
        num_heads, num_names = self._ledger.table.num_heads, self._ledger.num_names
        pages: Indices = self._ledger.table.entries[beams, :, tiles].reshape(-1).astype(np.int64)
        # Most steps of a decoder write into tiles that are there and are not shared.
        if pages.min() >= 0 and num_names[pages].max() == 1:
            return pages
        heads = np.tile(np.arange(num_heads), beams.size)
        return self.own(np.repeat(beams, num_heads), heads, np.repeat(tiles, num_heads))

    def own(self, beams: Indices, heads: Indices, tiles: Indices) -> Indices:
        """The pages of m tiles, no tile twice, each its beam's alone: new for those without, copies of shared ones.

        Raises: OutOfPagesError, and whatever on_evict raises; then nothing has changed.
        """
        ledger = self._ledger
        pages = ledger.table.entries[beams, heads, tiles].astype(np.int64)
        lacking = ledger.lacking(pages)
        if not lacking.size:
            return pages
        victims = ledger.victims(lacking.size, kept=pages[pages >= 0])
        self._announce(victims)
        ledger.evict(victims)
        self.num_evictions += victims.size
        taken, old = ledger.take(lacking.size), pages[lacking]
        try:
            self._buffers.copy(old[old >= 0], taken[old >= 0])
        except BaseException:
            ledger.give_back(taken)
            raise
        ledger.name(beams[lacking], heads[lacking], tiles[lacking], taken)
        pages[lacking] = taken
        return pages

    def _announce(self, victims: Indices) -> None:
        if self._on_evict is None:
            return
        self.announcing_thread = threading.get_ident()
        try:
            for page in victims.tolist():
                head, tile = divmod(int(self._ledger.tile_of[page]), self._ledger.table.num_tiles)
                key, value = self._buffers.read(page, "k"), self._buffers.read(page, "v")
                self._on_evict(self._ledger.beams_of(page), head, tile, key, value)
        finally:
            self.announcing_thread = None
