"""Where the bytes of pages are, and the tables that name them."""

from __future__ import annotations

from .host import HostPageStore
from .hybrid_pool import HybridKVPool
from .layer_groups import LayerGroup, make_layer_groups
from .mla_pool import MLAPool
from .page_table import PageTable
from .pool import KVPool
from .tiles import HostTileCache, TileCache, TileKey, TilePageTable

__all__ = [
    "HostPageStore",
    "HostTileCache",
    "HybridKVPool",
    "KVPool",
    "LayerGroup",
    "MLAPool",
    "PageTable",
    "TileCache",
    "TileKey",
    "TilePageTable",
    "make_layer_groups",
]
