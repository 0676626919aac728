"""Caches of tiles: K and V of a run of tokens of one sequence or beam and one KV head."""

from __future__ import annotations

from .host_tile_cache import HostTileCache
from .tile_cache import TileCache
from .tile_geometry import TileGeometry
from .tile_key import TileKey
from .tile_page_table import TilePageTable

__all__ = ["HostTileCache", "TileCache", "TileGeometry", "TileKey", "TilePageTable"]
