"""Which page each tile of each beam and head is on: a dense table on the host and its copy on the device."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...shapes import Shapes, check_dtype, check_int
from .tile_key import MAX_INDEX

__all__ = ["Entries", "Indices", "PageIds", "TilePageTable", "check_index", "check_indices", "copied_indices"]

Indices = npt.NDArray[np.int64]
Entries = npt.NDArray[np.int32]
PageIds = npt.NDArray[np.integer]


class TilePageTable:
    """Page ids of tiles, -1 where there is none; what changes on the host is uploaded when the device's copy is read.

    Shapes: host and device_table [num_beams, num_heads, num_tiles] int32. They are two tensors on every device, "cpu"
            included. `host` is for reading: it changes through the methods alone.
    Lock:   `lock`, around every change and every upload: any number of threads may call anything. A call that an
            exception such as KeyboardInterrupt stops may be half-done on the host; the device's copy follows the host.
    Owns:   both tensors. Nothing is written if a call raises an error of its own.
    Raises: ValueError, TypeError for an index outside the table, naming which one.

    >>> table = TilePageTable(2, 3, 4)
    >>> table.assign(1, 2, 0, page=7)
    >>> table.lookup(1, 2, 0), table.lookup(1, 2, 1), int(table.device_table[1, 2, 0])
    (7, -1, 7)
    """

    def __init__(
        self, num_beams: int, num_heads: int, num_tiles: int, *, device: torch.device | str | int = "cpu"
    ) -> None:
        for name, count in (("num_beams", num_beams), ("num_heads", num_heads), ("num_tiles", num_tiles)):
            check_int(name, count, minimum=1)
        shape = num_beams, num_heads, num_tiles
        # Outside inference mode, so that both can be written inside and outside of it later.
        with torch.inference_mode(False):
            self.host = torch.full(shape, -1, dtype=torch.int32, device="cpu")
            self._on_device = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.num_syncs = 0
        self.num_synced = 0
        self.lock = threading.RLock()
        self._dirty = 0, 0

    @property
    def num_beams(self) -> int:
        """How many beams it has rows for."""
        return self.host.shape[0]

    @property
    def num_heads(self) -> int:
        """KV heads a beam."""
        return self.host.shape[1]

    @property
    def num_tiles(self) -> int:
        """The most tiles a beam may have."""
        return self.host.shape[2]

    @property
    def device(self) -> torch.device:
        """Where `device_table` is."""
        return self._on_device.device

    @property
    def entries(self) -> Entries:
        """`host` as a numpy array that shares its bytes."""
        entries: Entries = self.host.numpy()
        return entries

    @property
    def device_table(self) -> torch.Tensor:
        """The table on the device, as the host has it now; for reading."""
        self.sync()
        return self._on_device

    def sync(self) -> int:
        """Uploads the entries from the first changed one to the last; returns how many these were.

        `num_syncs` counts uploads and `num_synced` uploaded entries since the table exists.
        """
        with self.lock:
            dirty = first, stop = self._dirty
            if stop > first:
                self._upload(first, stop)
                # What a signal handler has changed meanwhile, on this thread, is still to be uploaded.
                if self._dirty is dirty:
                    self._dirty = 0, 0
                self.num_syncs += 1
                self.num_synced += stop - first
            return stop - first

    def _upload(self, first: int, stop: int) -> None:
        """Copies entries of the flat table; to a GPU without waiting for what it still computes.

        That copy is from pinned memory of its own, which torch keeps until it is over: the host's table may change
        meanwhile.
        """
        changed, is_gpu = self.host.view(-1)[first:stop], self._on_device.is_cuda
        if is_gpu:
            changed = changed.pin_memory()
        self._on_device.view(-1)[first:stop].copy_(changed, non_blocking=is_gpu)

    def lookup(self, beam: int, head: int, tile: int) -> int:
        """The page of a tile, -1 for none."""
        self.check(beam, head, tile)
        return int(self.entries[beam, head, tile])

    def assign(self, beam: int, head: int, tile: int, page: int) -> None:
        """Says which page a tile is on, in place of what was said before."""
        self.check(beam, head, tile)
        check_index("page", page, MAX_INDEX + 1)
        self._write_tile(beam, head, tile, page)

    def remove(self, beam: int, head: int, tile: int) -> int:
        """Takes a tile out; returns the page that it was on, -1 for none."""
        with self.lock:
            page = self.lookup(beam, head, tile)
            if page >= 0:
                self._write_tile(beam, head, tile, -1)
            return page

    def assign_batch(self, beams: torch.Tensor, heads: torch.Tensor, tiles: torch.Tensor, pages: torch.Tensor) -> None:
        """Assigns n tiles at once: beams, heads, tiles and pages [n] int64 on the CPU. Of duplicates the last wins.

        Nothing is assigned if one index is outside of the table.
        """
        shapes, columns = Shapes(), []
        bounds = zip(("beams", "heads", "tiles", "pages"), (*self.host.shape, MAX_INDEX + 1), strict=True)
        for (name, bound), index in zip(bounds, (beams, heads, tiles, pages), strict=True):
            shapes.check(name, index, "n")
            check_dtype(name, index, torch.int64)
            if not index.is_cpu:
                raise ValueError(f"{name} must be on the CPU, got {index.device}.")
            columns.append(copied_indices(index))
            check_indices(name, columns[-1], bound)
        self.write_batch(*columns)

    def clear(self) -> None:
        """Takes all tiles out."""
        self.write_beams(0, self.num_beams, -1)

    def check(self, beam: int, head: int, tile: int) -> None:
        """Refuses an index outside the table, naming which of the three."""
        num_beams, num_heads, num_tiles = self.host.shape
        check_index("beam", beam, num_beams)
        check_index("head", head, num_heads)
        check_index("tile", tile, num_tiles)

    def write_batch(self, beams: Indices, heads: Indices, tiles: Indices, pages: PageIds | int) -> None:
        """`assign_batch` of indices that are known to be in the table; the page -1 takes tiles out."""
        if not beams.size:
            return
        _, num_heads, num_tiles = self.host.shape
        flat = (beams * num_heads + heads) * num_tiles + tiles
        self._write((beams, heads, tiles), pages, int(flat.min()), int(flat.max()) + 1)

    def write_beams(self, first: int, stop: int, rows: Entries | int) -> None:
        """Puts rows [stop - first, num_heads, num_tiles] of known pages in the place of beams [first, stop)."""
        entries_a_beam = self.num_heads * self.num_tiles
        self._write(slice(first, stop), rows, first * entries_a_beam, stop * entries_a_beam)

    def mark_all(self) -> None:
        """Has the next upload take the whole table."""
        with self.lock:
            self._mark(0, self.host.numel())

    def _write_tile(self, beam: int, head: int, tile: int, page: int) -> None:
        flat = (beam * self.num_heads + head) * self.num_tiles + tile
        self._write((beam, head, tile), page, flat, flat + 1)

    def _write(self, places: Any, pages: PageIds | int, first: int, stop: int) -> None:
        """The one place where entries change, all within [first, stop) of the flat table."""
        with self.lock:
            # Before, for an interrupt after the change; after, for a signal handler that uploads just before it.
            self._mark(first, stop)
            self.entries[places] = pages
            self._mark(first, stop)

    def _mark(self, first: int, stop: int) -> None:
        dirty_first, dirty_stop = self._dirty
        if dirty_stop > dirty_first:
            first, stop = min(first, dirty_first), max(stop, dirty_stop)
        self._dirty = first, stop

    def __repr__(self) -> str:
        return f"TilePageTable({self.num_beams}, {self.num_heads}, {self.num_tiles}, device={str(self.device)!r})"


def check_index(name: str, index: object, count: int) -> None:
    """Refuses what is not an int from 0 to count - 1."""
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"{name} must be an int, got {type(index).__name__}.")
    if not 0 <= index < count:
        raise ValueError(f"{name} must be in 0..{count - 1}, got {index}.")


def check_indices(name: str, indices: Indices, count: int) -> None:
    """Refuses an array with an entry that is not from 0 to count - 1."""
    if indices.size and not (indices.min() >= 0 and indices.max() < count):
        entry = int(((indices < 0) | (indices >= count)).argmax())
        raise ValueError(f"{name} must be in 0..{count - 1}, got {indices[entry]} at entry {entry}.")


def copied_indices(index: torch.Tensor) -> Indices:
    """An index tensor on the host, 64 bits wide and with memory of its own: what is checked then is what is used."""
    return np.array(index.cpu().numpy(), np.int64)
