"""What beams do as a whole: share the tiles of another one, change places, drop all they have."""

from __future__ import annotations

import numpy as np

from .tile_ledger import TileLedger
from .tile_page_table import Indices, PageIds

__all__ = ["clear_beams", "fork_beam", "remove_beam", "reorder_beams"]


def fork_beam(ledger: TileLedger, src: int, dst: int) -> None:
    """Lets beam `dst` share all tiles of another beam; refuses one that has tiles, and tiles that are written."""
    entries = ledger.table.entries
    num_held = int((entries[dst] >= 0).sum())
    if num_held:
        raise ValueError(f"beam {dst} must have no tiles, got {num_held}. Call remove_beam first.")
    pages = entries[src][entries[src] >= 0]
    _check_not_written(ledger, pages)
    num_names = ledger.num_names.copy()
    num_names[pages] += 1
    ledger.is_sound = False
    ledger.table.write_beams(dst, dst + 1, entries[src : src + 1])
    ledger.rename(num_names)
    ledger.is_sound = True


def reorder_beams(ledger: TileLedger, parents: Indices) -> None:
    """Gives every beam b the tiles of beam parents[b], all at once; refuses to give on tiles that are written."""
    moved = np.flatnonzero(parents != np.arange(parents.size))
    if not moved.size:
        return
    before = ledger.table.entries
    entries = before[parents]
    if ledger.num_writers.any():
        _check_not_written(ledger, entries[(entries != before) & (entries >= 0)])
    num_names = ledger.count_names(entries)
    first, stop = int(moved[0]), int(moved[-1]) + 1
    ledger.is_sound = False
    ledger.table.write_beams(first, stop, entries[first:stop])
    ledger.rename(num_names)
    ledger.is_sound = True


def remove_beam(ledger: TileLedger, beam: int) -> int:
    """Takes all tiles from a beam; returns how many these were."""
    row = ledger.table.entries[beam]
    pages = row[row >= 0]
    ledger.is_sound = False
    ledger.table.write_beams(beam, beam + 1, -1)
    ledger.forget(pages)
    ledger.is_sound = True
    return int(pages.size)


def clear_beams(ledger: TileLedger) -> None:
    """Takes all tiles from all beams."""
    ledger.is_sound = False
    ledger.table.clear()
    ledger.rename(np.zeros(ledger.num_pages, np.int32))
    ledger.is_sound = True


def _check_not_written(ledger: TileLedger, pages: PageIds) -> None:
    """Refuses pages for a beam that has not named them if somebody writes to them for the one that has."""
    written = pages[ledger.num_writers[pages] > 0]
    if written.size:
        head, tile = divmod(int(ledger.tile_of[written[0]]), ledger.table.num_tiles)
        raise ValueError(
            "a tile must not be shared while it is pinned to be written, nor go to another beam, "
            f"got tile {tile} of head {head}. Unpin it first."
        )
