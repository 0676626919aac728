"""A cache of tiles on one device: pages of keys and values, and a table of which beam's tile is on which page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import numpy as np
import torch

from ...kernels.upload import uploaded
from ...shapes import Shapes, check_int
from .tile_beams import clear_beams, fork_beam, remove_beam, reorder_beams
from .tile_buffers import Tile, TileBuffers
from .tile_cache_stats import TileCacheStats
from .tile_file import read_tile_file, write_tile_file
from .tile_geometry import TileGeometry
from .tile_integrity import check_tiles
from .tile_key import check_part
from .tile_ledger import TileLedger
from .tile_owner import OnEvict, TileOwner
from .tile_page_table import Entries, Indices, TilePageTable, check_index
from .tile_pins import Held, PinnedBlock
from .tile_record import POOL
from .tile_snapshot import check_snapshot, load_snapshot, take_snapshot
from .tile_span import Flags, asked_tiles, beam_indices, check_span, parent_indices, touched_tiles

__all__ = ["TileCache"]

_Ids = TypeVar("_Ids")


class TileCache:
    """Keys and values of beams in pages of one tile each, shared between beams until one of them writes.

    Shapes: key_pages [num_pages, tile_size, head_dim]; value_pages [num_pages, tile_size, value_dim]; for int8
            key_scales and value_scales [num_pages, 1, tile_size] float32, else None. num_heads counts KV heads,
            num_tiles the tiles that a beam may have at most. Pages start uninitialised.
    Pages:  a page is of one (head, tile), of all beams with that page in `table`. When no page is free, the one used
            longest ago that is not pinned goes; `on_evict(beams, head, tile, key, value)` gets copies of it first, and
            if that raises, the call fails and nothing has changed. Inside of it the cache may be read, not changed.
    Pins:   are on pages. A pinned page is not evicted and not given away: when its beams drop it, move or are removed,
            it stays as it is until the last unpin. The beam it was pinned for may write into it, if it has it alone;
            any other beam gets a copy. While it is pinned to be written it cannot come to another beam.
    Lock:   one, that of `table`, around every call: any number of threads may call anything. What `get` gives is the
            caller's own; a view or page ids are good for as long as they are pinned. A call from inside of another one
            on the same thread, which a signal handler or a finalizer can make, is refused with RuntimeError.
    Owns:   pages and `table`, which is for reading: it changes through the cache alone. A call that raises an error of
            its own has changed nothing.
    Stops:  KeyboardInterrupt, or what else a signal handler raises, may leave a part of the call's effect: some of the
            tiles that had to go are gone, new tiles are there with any content, tokens are half-written, a pin of `pin`
            or `get_for_write` is there or not, a load has left nothing. The books hold: the next call makes them from
            the table and the record of pins. The pins of blocks end with their blocks however those end.
    Raises: ValueError, TypeError for bad input; OutOfPagesError when all pages that could go are pinned or needed.

    >>> cache = TileCache(8, 16, 64, num_beams=2, num_heads=1, num_tiles=4)
    >>> cache.store(torch.ones(1, 1, 3, 64), torch.ones(1, 1, 3, 64), torch.tensor([0]), torch.tensor([1]))
    >>> cache.fork(1, 0)
    >>> cache.get(0, 0, 0, "k")[:3].sum().item(), len(cache)
    (192.0, 1)
    """

    def __init__(
        self,
        num_pages: int,
        tile_size: int,
        head_dim: int,
        *,
        num_beams: int,
        num_heads: int,
        num_tiles: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int = "cpu",
        on_evict: OnEvict | None = None,
    ) -> None:
        check_int("num_pages", num_pages, minimum=1)
        if on_evict is not None and not callable(on_evict):
            raise TypeError(f"on_evict must be callable, got {type(on_evict).__name__}.")
        self.geometry = TileGeometry(tile_size, head_dim, head_dim if value_dim is None else value_dim, dtype)
        self.table = TilePageTable(num_beams, num_heads, num_tiles, device=device)
        self._buffers = TileBuffers(self.geometry, num_pages, device)
        self._ledger = TileLedger(num_pages, self.table)
        self._owner = TileOwner(self._ledger, self._buffers, on_evict)
        self._hits = self._misses = 0
        self._lock = self.table.lock

    @property
    def num_pages(self) -> int:
        """Pages of the cache, used and free."""
        return self._ledger.num_pages

    @property
    def capacity(self) -> int:
        """The same as `num_pages`."""
        return self._ledger.num_pages

    @property
    def num_beams(self) -> int:
        """How many beams it has rows for."""
        return self.table.num_beams

    @property
    def num_heads(self) -> int:
        """KV heads a beam."""
        return self.table.num_heads

    @property
    def num_tiles(self) -> int:
        """The most tiles a beam may have."""
        return self.table.num_tiles

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._buffers.device

    @property
    def key_pages(self) -> torch.Tensor:
        """[num_pages, tile_size, head_dim]."""
        return self._buffers.key_pages

    @property
    def value_pages(self) -> torch.Tensor:
        """[num_pages, tile_size, value_dim]."""
        return self._buffers.value_pages

    @property
    def key_scales(self) -> torch.Tensor | None:
        """[num_pages, 1, tile_size] float32 for int8, else None."""
        return self._buffers.key_scales

    @property
    def value_scales(self) -> torch.Tensor | None:
        """[num_pages, 1, tile_size] float32 for int8, else None."""
        return self._buffers.value_scales

    def register_tile(self, beam: int, head: int, tile: int) -> int:
        """The page of a tile, which becomes the most recently used; a new page, with any content, if it has none."""
        self.table.check(beam, head, tile)
        with self._changing():
            self._ledger.settle()
            page = int(self.table.entries[beam, head, tile])
            if page < 0:
                page = self._owner.own_tile(beam, head, tile)
            self._ledger.use.touch_page(page)
            return page

    def get(self, beam: int, head: int, tile: int, part: str) -> Tile | None:
        """A copy of the keys ("k") or values ("v") of a tile, codes and scales for int8; None if it is not there."""
        self.table.check(beam, head, tile)
        check_part(part)
        with self._reading():
            page = int(self.table.entries[beam, head, tile])
            if page < 0:
                self._misses += 1
                return None
            self._hits += 1
            self._ledger.use.touch_page(page)
            return self._buffers.read(page, part)

    def get_for_write(self, beam: int, head: int, tile: int, part: str) -> Tile:
        """The keys or values of a tile where they lie, to be written; codes and scales for int8.

        The page is this beam's alone, copied if it was shared, and new, with any content, if there was none. It is
        pinned once by each call, until `unpin(beam, head, tile)`, and no other beam can come to share it before.
        """
        self.table.check(beam, head, tile)
        check_part(part)
        with self._changing():
            self._ledger.settle()
            page = self._own_for_write(beam, head, tile)
            self._pin_tile(beam, head, tile, Held.one(page, beam, writes=True))
            return self._buffers.view(page, part)

    @contextmanager
    def writing(self, beam: int, head: int, tile: int) -> Iterator[tuple[Tile, Tile]]:
        """Keys and values as `get_for_write` gives them, until the end of the block."""
        self.table.check(beam, head, tile)
        block = None
        try:
            with self._changing():
                self._ledger.settle()
                page = self._own_for_write(beam, head, tile)
                views = self._buffers.view(page, "k"), self._buffers.view(page, "v")
                block = self._pin_block(Held.one(page, beam, writes=True))
            yield views
        finally:
            self._end_block(block)

    def pin(self, beam: int, head: int, tile: int) -> int:
        """Keeps the page of a tile from eviction until `unpin`, once for each call; returns the page.

        Raises: KeyError when the tile is not there.
        """
        self.table.check(beam, head, tile)
        with self._changing():
            self._ledger.settle()
            page = int(self.table.entries[beam, head, tile])
            if page < 0:
                raise KeyError(f"tile {(beam, head, tile)} must be in the cache, got one that is not.")
            self._pin_tile(beam, head, tile, Held.one(page, beam, writes=False))
            return page

    def unpin(self, beam: int, head: int, tile: int) -> None:
        """Undoes the latest `pin` or `get_for_write` of the same three numbers, whatever page the beam has by now.

        Raises: ValueError when there is none.
        """
        self.table.check(beam, head, tile)
        with self._changing():
            ledger, by_tile = self._ledger, self._ledger.pins.by_tile
            ledger.settle()
            of_tile = by_tile.get((beam, head, tile))
            if of_tile is None:
                raise ValueError(f"tile {(beam, head, tile)} must be pinned, got one that is not.")
            ledger.is_sound = False
            if len(of_tile) > 1:
                by_tile[beam, head, tile] = of_tile[:-1]
            else:
                del by_tile[beam, head, tile]
            ledger.unpin(of_tile[-1])
            ledger.is_sound = True

    def pinned_pages(
        self, beam_ids: torch.Tensor | None, num_tiles: int | torch.Tensor
    ) -> AbstractContextManager[torch.Tensor]:
        """Page ids of the first tiles of R beams; until the end of the block each of these pages stays this tile.

        Their own beam may still write new tokens into them, if it has them alone. The tiles count as used, in the
        order in which they stand.

        Shapes: beam_ids [R] int64, beams in any order and repeated at will, None for all; num_tiles one number for all
                rows, or [R] int64, one for each; the result [R, num_heads, max(num_tiles)] int32 on the cache's device,
                -1 for a tile that is not there and beyond the tiles of its row.
        """
        return self._pinned(beam_ids, num_tiles, self._ids_on_device)

    def pinned_entries(
        self, beam_ids: torch.Tensor | None, num_tiles: int | torch.Tensor
    ) -> AbstractContextManager[Entries]:
        """The same page ids as an array in main memory, which a GPU is not asked for."""
        return self._pinned(beam_ids, num_tiles, self._ids_on_host)

    def _ids_on_device(self, beams: Indices, most: int, is_asked: Flags | None) -> torch.Tensor:
        ids = self.table.device_table[:, :, :most].index_select(0, uploaded(beams, self.device))
        return ids if is_asked is None else ids.masked_fill_(uploaded(~is_asked, self.device), -1)

    def _ids_on_host(self, beams: Indices, most: int, is_asked: Flags | None) -> Entries:
        ids: Entries = self.table.entries[beams, :, :most]
        return ids if is_asked is None else np.where(is_asked, ids, np.int32(-1))

    @contextmanager
    def _pinned(
        self,
        beam_ids: torch.Tensor | None,
        num_tiles: int | torch.Tensor,
        read: Callable[[Indices, int, Flags | None], _Ids],
    ) -> Iterator[_Ids]:
        beams = beam_indices(Shapes(), beam_ids, self.num_beams, self.device, "R")
        most, is_asked = asked_tiles(num_tiles, beams.size, self.num_tiles, self.device)
        block = None
        try:
            with self._changing():
                self._ledger.settle()
                rows = self.table.entries[beams, :, :most]
                is_there = rows >= 0 if is_asked is None else (rows >= 0) & is_asked
                present = rows[is_there].astype(np.int64)
                num_asked = rows.size if is_asked is None else int(is_asked.sum()) * self.num_heads
                self._hits += present.size
                self._misses += num_asked - present.size
                self._ledger.use.touch(present)
                ids = read(beams, most, is_asked)
                readers = np.repeat(beams, self.num_heads * most)[is_there.ravel()]
                block = self._pin_block(Held.read(present, readers, self.num_pages))
            yield ids
        finally:
            self._end_block(block)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        first_tokens: torch.Tensor,
        beam_ids: torch.Tensor | None = None,
    ) -> None:
        """Writes n new tokens of each of R beams; tiles that are not there come to be, shared ones are copied first.

        Shapes: key [R, num_heads, n, head_dim], value [R, num_heads, n, value_dim], first_tokens [R] int64, the
                position of the first of the n tokens of each row; beam_ids [R] int64, no beam twice, None for all.
        Dtype:  that of the cache; for int8 float32, float16 or bfloat16, quantised as `pagedkv.store_kv` does.
        Owns:   writes only the named tokens; in tiles that are new the others become zero. A tile that this call needs
                is not evicted by it.
        """
        span = check_span(self.geometry, self.table, self.device, key, value, first_tokens, beam_ids)
        if not span.num_tokens or not span.beams.size:
            return
        touched = touched_tiles(span)
        with self._changing():
            self._ledger.settle()
            self._ledger.use.touch(self._owner.own_all_heads(touched))
            slots = span.slots(self.table.entries)
            tokens, values = key.reshape(-1, 1, key.shape[3]), value.reshape(-1, 1, value.shape[3])
            self._buffers.store(tokens, values, slots)

    def fork(self, src: int, dst: int) -> None:
        """Lets beam `dst`, which must have no tiles, share all tiles of beam `src`.

        Raises: ValueError when dst has tiles, is src, or when a tile of src is pinned to be written.
        """
        for name, beam in (("src", src), ("dst", dst)):
            check_index(name, beam, self.num_beams)
        if src == dst:
            raise ValueError(f"dst must be another beam than src, got {dst} for both.")
        with self._changing():
            self._ledger.settle()
            fork_beam(self._ledger, src, dst)

    def reorder(self, parents: Iterable[int] | torch.Tensor) -> None:
        """Gives every beam b the tiles that beam parents[b] has, all at once; tiles that no beam has now are dropped.

        Raises: ValueError when a beam would get a tile of another one that is pinned to be written.
        """
        rows = parent_indices(parents, self.num_beams)
        with self._changing():
            self._ledger.settle()
            reorder_beams(self._ledger, rows)

    def remove(self, beam: int, head: int, tile: int) -> bool:
        """Takes a tile from a beam; returns whether there was one."""
        self.table.check(beam, head, tile)
        with self._changing():
            ledger = self._ledger
            ledger.settle()
            ledger.is_sound = False
            page = self.table.remove(beam, head, tile)
            if page >= 0:
                ledger.forget(np.array([page]))
            ledger.is_sound = True
            return page >= 0

    def remove_beam(self, beam: int) -> int:
        """Takes all tiles from a beam; returns how many these were."""
        check_index("beam", beam, self.num_beams)
        with self._changing():
            self._ledger.settle()
            return remove_beam(self._ledger, beam)

    def clear(self) -> None:
        """Takes all tiles from all beams; what is pinned stays until it is not."""
        with self._changing():
            self._ledger.settle()
            clear_beams(self._ledger)

    def contains(self, beam: int, head: int, tile: int) -> bool:
        """Whether a tile is there; does not count as a use."""
        with self._reading():
            return self.table.lookup(beam, head, tile) >= 0

    def __len__(self) -> int:
        with self._reading():
            self._settle_for_reading()
            return self.num_pages - len(self._ledger.free)

    def stats(self) -> TileCacheStats:
        """Counts of pages, hits, misses and evictions, all of one moment."""
        with self._reading():
            self._settle_for_reading()
            num_free, num_shared = len(self._ledger.free), int(np.count_nonzero(self._ledger.num_names > 1))
            used = self.num_pages - num_free
            now = self.num_pages, used, num_free, self._ledger.num_pinned, num_shared
            return TileCacheStats(*now, self._hits, self._misses, self._owner.num_evictions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all tiles, who shares them and their order of use to a file; see docs/tile_format.md.

        The content is that of one moment; other calls wait while it is copied, not while it is written.
        """
        with self._reading():
            record = take_snapshot(self._ledger, self._buffers)
        write_tile_file(path, record)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replaces all tiles by those of a file of the same geometry that fits; all or nothing.

        Raises: ValueError when something is pinned, or when the file holds another geometry or more than fits;
                CorruptPageError when it is damaged.
        """
        record = read_tile_file(
            path, kind=POOL, geometry=self.geometry, capacity=self.num_pages, max_names=self.table.entries.size
        )
        check_snapshot(record, self.table)
        with self._changing():
            self._ledger.settle()
            num_pinned = self._ledger.num_pinned
            if num_pinned:
                raise ValueError(f"no page may be pinned while a cache is loaded, got {num_pinned}. Unpin them first.")
            load_snapshot(record, self._ledger, self._buffers)

    def check(self) -> None:
        """Proves that the books agree: see tile_integrity.py. For tests: it passes over all pages and the whole table.

        Raises: IntegrityError that quotes the sentence that does not hold, and the evidence.
        """
        with self._changing():
            self._ledger.settle()
            check_tiles(self._ledger)

    def __repr__(self) -> str:
        return f"TileCache({self.num_pages}, {self.geometry}, table={self.table}, num_used={len(self)})"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a tile cache must stay where it is, got a call of copy or pickle. Use save and load.")

    def _changing(self) -> AbstractContextManager[object]:
        """The lock, for a call that changes the cache; refuses one from inside of another on the same thread.

        The lock itself is what `with` gets, and the books are settled inside: an interrupt cannot come between.
        """
        if self._is_inside():
            if self._owner.is_announcing:
                raise RuntimeError(
                    "the cache must not be changed by its on_evict, nor may pages be pinned there, got a call from "
                    "inside of it. Read tiles with get."
                )
            raise RuntimeError(
                "a cache must not be called from inside of one of its own calls, as a signal handler or a finalizer "
                "can, got such a call. Make it when the other has ended."
            )
        return self._lock

    def _reading(self) -> AbstractContextManager[object]:
        """The lock, for a call that on_evict may make too."""
        return self._lock if self._owner.is_announcing else self._changing()

    def _settle_for_reading(self) -> None:
        if not self._owner.is_announcing:
            self._ledger.settle()

    def _is_inside(self) -> bool:
        # The method by which threading.Condition asks its lock.
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]

    def _own_for_write(self, beam: int, head: int, tile: int) -> int:
        page = int(self.table.entries[beam, head, tile])
        if page < 0 or not self._ledger.may_write(page, beam):
            page = self._owner.own_tile(beam, head, tile)
        self._ledger.use.touch_page(page)
        return page

    def _pin_tile(self, beam: int, head: int, tile: int, held: Held) -> None:
        ledger, by_tile = self._ledger, self._ledger.pins.by_tile
        ledger.is_sound = False
        by_tile[beam, head, tile] = (*by_tile.get((beam, head, tile), ()), held)
        ledger.pin(held)
        ledger.is_sound = True

    def _pin_block(self, held: Held) -> PinnedBlock:
        ledger = self._ledger
        ledger.is_sound = False
        block = ledger.pins.open_block(held)
        ledger.pin(held)
        ledger.is_sound = True
        return block

    def _end_block(self, block: PinnedBlock | None) -> None:
        """Has the next call take off the pins of a block; without the lock: a finalizer may end a block anywhere."""
        if block is not None:
            self._ledger.pins.end_block(block)
