"""All that a tile cache saves, as tensors: what a tile file holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .tile_geometry import TileGeometry

__all__ = ["HOST", "POOL", "TileRecord"]

# Which cache a record is of: tiles of keys and of values each by themselves, or pages that hold one of each.
HOST, POOL = "host", "pool"


@dataclass(frozen=True, eq=False)
class TileRecord:
    """The content of a tile cache; every stored tile (HOST) or page (POOL) once, however many keys name it.

    Shapes: names [m, 4] int64: sequence or beam, head, tile, and 0 for "k", 1 for "v", 2 for both (POOL);
            named [m] int64: which of the n stored ones each row names; every one is named at least once;
            tiles, each contiguous, on the CPU and with the n stored ones in front:
              HOST: ([n, tile_size, head_dim],) in dtype, and for int8 [n, tile_size] float32 scales
              POOL: ([n, tile_size, head_dim], [n, tile_size, value_dim]), and for int8 two of [n, tile_size] float32.
    Order:  rows of `names` stand from the least to the most recently used.
    """

    kind: str
    geometry: TileGeometry
    names: torch.Tensor
    named: torch.Tensor
    tiles: tuple[torch.Tensor, ...]
