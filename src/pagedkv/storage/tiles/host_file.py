"""A HostTileCache as a file, and back."""

from __future__ import annotations

import os

import numpy as np
import torch

from ...kernels.quantize import QuantizedKV
from .host_keys import keys_of_rows, rows_of_keys
from .host_slots import HostSlots, Key, SlotIds
from .host_tiles import HostTiles, Tile, TileContent
from .host_turns import HostTurns
from .tile_file import read_tile_file, write_tile_file
from .tile_geometry import TileGeometry
from .tile_record import HOST, TileRecord

__all__ = ["load_host_tiles", "save_host_tiles"]


def save_host_tiles(
    path: str | os.PathLike[str], geometry: TileGeometry, slots: HostSlots, tiles: HostTiles, turns: HostTurns
) -> None:
    """Writes keys, their order and their tiles, all of one moment; nobody waits while the file is written."""
    names: list[tuple[Key, int]] = []
    read: list[Tile] = []

    def find() -> SlotIds:
        names[:] = slots.by_key.items()
        return np.array(list(dict.fromkeys(slot for _, slot in names)), np.int64)

    def copy(stored: SlotIds) -> None:
        read.append(tiles.new_batch(len(stored)))
        tiles.read_batch(stored, read[0])

    turns.read(find, copy)
    rows = {slot: row for row, slot in enumerate(dict.fromkeys(slot for _, slot in names))}
    named = torch.from_numpy(np.array([rows[slot] for _, slot in names], np.int64))
    parts = tuple(read[0]) if isinstance(read[0], QuantizedKV) else (read[0],)
    write_tile_file(path, TileRecord(HOST, geometry, rows_of_keys([key for key, _ in names]), named, parts))


def load_host_tiles(
    path: str | os.PathLike[str], geometry: TileGeometry, slots: HostSlots, tiles: HostTiles, turns: HostTurns
) -> None:
    """Puts what a file holds in the place of all content; readers wait until it is there."""
    record = read_tile_file(path, kind=HOST, geometry=geometry, capacity=slots.capacity)
    keys, content = keys_of_rows(record.names), TileContent(record.tiles[0], *record.tiles[1:] or (None,))

    def start() -> SlotIds:
        if slots.has_pins:
            raise ValueError("a cache to load into must have nothing pinned, got pins. Unpin them first.")
        slots.reserve_all()
        return np.arange(slots.capacity)

    turns.write(
        start,
        lambda targets: tiles.write_batch(targets[: len(content.values)], content),
        lambda targets: slots.publish_all(keys, record.named.numpy()),
    )
