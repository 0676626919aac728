"""The whole content of a tile cache as one record, and back."""

from __future__ import annotations

import numpy as np
import torch

from .tile_buffers import TileBuffers
from .tile_ledger import TileLedger
from .tile_page_table import TilePageTable, check_indices
from .tile_record import POOL, TileRecord

__all__ = ["check_snapshot", "load_snapshot", "take_snapshot"]

# What a record has in the place of "k" or "v": a page holds a tile of each.
_BOTH = 2


def take_snapshot(ledger: TileLedger, buffers: TileBuffers) -> TileRecord:
    """Copies of all pages that beams name, the one used longest ago first, and of the names."""
    entries = ledger.table.entries
    beams, heads, tiles = np.nonzero(entries >= 0)
    pages = entries[beams, heads, tiles].astype(np.int64)
    order = np.argsort(ledger.use.last_used[pages], kind="stable")
    pages = pages[order]
    # No two pages were last used at the same time, so the names of one page stand together.
    starts = np.diff(pages, prepend=-1) != 0
    names = np.stack([beams, heads, tiles, np.full_like(beams, _BOTH)], axis=1)[order]
    named = torch.from_numpy(np.cumsum(starts) - 1)
    return TileRecord(POOL, buffers.geometry, torch.from_numpy(names), named, buffers.gather(pages[starts]))


def check_snapshot(record: TileRecord, table: TilePageTable) -> None:
    """Refuses a record, sound by the rules of its file, with names that the table has no place for."""
    names = record.names.numpy()
    for column, (name, count) in enumerate(zip(("beam", "head", "tile"), table.host.shape, strict=True)):
        check_indices(f"{name} of a saved tile", names[:, column], count)


def load_snapshot(record: TileRecord, ledger: TileLedger, buffers: TileBuffers) -> None:
    """Puts a record that was checked in place of all that there is; nothing is pinned."""
    beams, heads, tiles, _ = record.names.numpy().T
    pages = record.named.numpy()
    ledger.is_sound = False
    # Before the pages change: a load that is stopped leaves nothing, never another tile under a name.
    ledger.table.clear()
    buffers.load(record.tiles)
    ledger.table.write_batch(beams, heads, tiles, pages)
    ledger.use.touch(pages)
    ledger.rebuild()
    ledger.is_sound = True
