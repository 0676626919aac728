"""A model's keys and values in the form in which a pool or a tile cache takes them."""

from __future__ import annotations

import torch

from ...spec import CACHE_DTYPES, KVCacheSpec
from ...storage.tiles.tile_geometry import TileGeometry

__all__ = ["as_storable"]


def as_storable(states: torch.Tensor, spec: KVCacheSpec | TileGeometry) -> torch.Tensor:
    """Keys or values as `KVPool.store` and `TileCache.store` take them: rounded to their dtype, but not for scales.

    A cache with scales quantises by itself and must see the numbers as they are: a cast to int8 would leave nothing.
    """
    dtype = spec.dtype
    if spec.has_scales:
        dtype = states.dtype if states.dtype in CACHE_DTYPES else torch.float32
    states = states.to(dtype)
    return states if states.stride(-1) == 1 else states.contiguous()
