"""Where the bytes of pages are, and the tables that name them."""

from __future__ import annotations

from .mla_pool import MLAPool
from .page_table import PageTable
from .pool import KVPool
from .tiles import HostTileCache, TileCache, TileKey, TilePageTable

__all__ = ["HostTileCache", "KVPool", "MLAPool", "PageTable", "TileCache", "TileKey", "TilePageTable"]
