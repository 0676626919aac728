"""What names one tile: which sequence or beam, which KV head, which run of tokens, keys or values."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MAX_INDEX", "PARTS", "TileKey", "check_part", "check_tile_key"]

PARTS = ("k", "v")
MAX_INDEX = 2**31 - 1


class TileKey(NamedTuple):
    """Tile t of a sequence and KV head holds its tokens [t * tile_size, (t + 1) * tile_size). A plain tuple will do.

    `part` is "k" for keys, "v" for values.
    """

    sequence: int
    head: int
    tile: int
    part: str


def check_tile_key(key: object) -> TileKey:
    """The key as a TileKey; refuses what is not three indices from 0 to 2^31 - 1 and a part."""
    if not isinstance(key, tuple) or len(key) != 4:
        raise TypeError(f"a tile key must be a tuple (sequence, head, tile, 'k' or 'v'), got {key!r}.")
    for name, index in zip(TileKey._fields, key[:3], strict=False):
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"{name} of a tile key must be an int, got {type(index).__name__}.")
        if not 0 <= index <= MAX_INDEX:
            raise ValueError(f"{name} of a tile key must be from 0 to {MAX_INDEX}, got {index}.")
    check_part(key[3])
    return TileKey(*key)


def check_part(part: object) -> None:
    """Refuses what names neither keys nor values."""
    if not isinstance(part, str) or part not in PARTS:
        raise ValueError(f"part of a tile must be 'k' or 'v', got {part!r}.")
