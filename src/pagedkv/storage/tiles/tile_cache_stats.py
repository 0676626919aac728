"""Counts of a tile cache."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["TileCacheStats"]


class TileCacheStats(NamedTuple):
    """Counts of pages now, and of what happened since the cache exists.

    num_used counts pages that are not free, num_shared those that more than one beam names. A hit or a miss is one tile
    that was asked for by `get` or `pinned_pages`; an eviction is one page.
    """

    num_pages: int
    num_used: int
    num_free: int
    num_pinned: int
    num_shared: int
    hits: int
    misses: int
    evictions: int
