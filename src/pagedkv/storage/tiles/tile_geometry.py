"""How large a tile is, and what its numbers are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...shapes import check_int, dtype_name

__all__ = ["TILE_DTYPES", "TileGeometry"]

TILE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class TileGeometry:
    """A tile of keys is [tile_size, head_dim], one of values [tile_size, value_dim], in `dtype`.

    dtype:  float32, float16, bfloat16, or int8 with one float32 scale a token: a tile's scales are [tile_size].
    Raises: ValueError or TypeError when a field is not usable, naming the field.
    """

    tile_size: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("tile_size", "head_dim", "value_dim"):
            check_int(name, getattr(self, name), minimum=1)
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype of tiles must be a torch.dtype, got {type(self.dtype).__name__}.")
        if self.dtype not in TILE_DTYPES:
            names = " or ".join(map(dtype_name, TILE_DTYPES))
            raise ValueError(f"dtype of tiles must be {names}, got {dtype_name(self.dtype)}.")

    @property
    def has_scales(self) -> bool:
        """Whether each token of a tile has a scale of its own."""
        return self.dtype == torch.int8
