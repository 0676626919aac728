"""Tiles in host memory by key: the least recently used one goes first, what is pinned stays."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.quantize import QuantizedKV
from ...shapes import check_int
from .host_keys import check_tile_keys, keys_of_rows, rows_of_keys
from .host_slots import HostSlots, Key
from .host_tiles import HostTiles, Tile, TileContent
from .tile_file import read_tile_file, write_tile_file
from .tile_geometry import TileGeometry
from .tile_key import MAX_INDEX, TileKey, check_tile_key
from .tile_record import HOST, TileRecord

__all__ = ["HostTileCache", "HostTileStats"]

_AnyKey = tuple[int, int, int, str]


class HostTileStats(NamedTuple):
    """What a HostTileCache holds and has done.

    num_tiles: tiles that a key names. num_keys: keys; more than tiles where sequences share. num_pinned: tiles that may
    not be evicted, those that only a view still holds included. num_free: slots for new tiles.
    hits, misses: of get, get_batch and pinned. evictions: keys that were dropped for room.
    """

    capacity: int
    num_tiles: int
    num_keys: int
    num_pinned: int
    num_free: int
    hits: int
    misses: int
    evictions: int


class HostTileCache:
    """Up to `capacity` tiles of [tile_size, head_dim] in RAM, each by itself: keys and values are two tiles.

    Keys:    TileKey, or a tuple (sequence, head, tile, "k" or "v").
    Dtypes:  float32, float16, bfloat16: moved bitwise. int8: float tiles are quantised by the rule of `quantize_kv`, a
             scale a token; codes with scales [tile_size] float32 are moved bitwise. What is read is a QuantizedKV then.
    Evicts:  a put without room drops keys, the least recently used first, until there is; never a pinned tile and never
             a key of the same put. `on_evict(key, tile)` gets each before any is dropped, with a copy of its own; what
             it raises fails the put, and nothing has changed. It may read this cache, not change it.
    Owns:    what get and get_batch return is the caller's. `pinned` gives a view that stays as it is meanwhile.
    Threads: any number may read and write. One lock is over the books and over the copy of a single tile; batches are
             copied outside of it, from slots that are marked as being read, to slots that no key names yet. So readers
             do not wait for each other's batches; writers take turns, and a reader waits for a batch that is being put
             only where that takes the slot of the very tile that is asked for. `on_evict` runs under the lock.
    Raises:  ValueError, TypeError for what breaks these lines, OutOfPagesError when what is not pinned does not give
             enough room; nothing has changed then.

    >>> cache = HostTileCache(capacity=2, tile_size=16, head_dim=64)
    >>> cache.put((0, 0, 0, "k"), torch.ones(16, 64))
    >>> cache.get((0, 0, 0, "k")).sum().item(), cache.get((0, 0, 0, "v"))
    (1024.0, None)
    """

    def __init__(
        self,
        capacity: int,
        tile_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        on_evict: Callable[[TileKey, Tile], object] | None = None,
    ) -> None:
        check_int("capacity", capacity, minimum=1)
        if on_evict is not None and not callable(on_evict):
            raise TypeError(f"on_evict must be callable or None, got {type(on_evict).__name__}.")
        self._geometry = TileGeometry(tile_size, head_dim, head_dim, dtype)
        self._on_evict = on_evict
        self._tiles = HostTiles(capacity, self._geometry)
        self._copies = self._tiles.copies
        self._slots = HostSlots(capacity)
        self._by_key = self._slots.by_key
        self._lock = threading.RLock()
        # Told when reads of a batch end and when a batch is put.
        self._changed = threading.Condition(self._lock)
        self._is_putting = False
        self._is_evicting = False
        # Keys whose slot is being written again: out of the books until it is done.
        self._rewritten: frozenset[Key] = frozenset()
        self._hits = self._misses = self._evictions = 0

    @property
    def capacity(self) -> int:
        """The most tiles."""
        return self._slots.capacity

    @property
    def geometry(self) -> TileGeometry:
        """Size and dtype of a tile; value_dim is head_dim."""
        return self._geometry

    def get(self, key: _AnyKey) -> Tile | None:
        """A copy of the tile, or None; its key is the most recently used then."""
        with self._lock:
            try:
                slot = self._by_key[key]
            except (KeyError, TypeError):
                if not self._has(key):
                    self._misses += 1
                    return None
                slot = self._by_key[key]
            self._by_key.move_to_end(key)
            self._hits += 1
            copy = self._copies[slot]
            return self._tiles.copy_of(slot)() if copy is None else copy()

    def get_batch(self, keys: Iterable[_AnyKey], out: Tile | None = None) -> Tile:
        """Copies of n tiles, [n, tile_size, head_dim]; the last key is the most recently used then.

        Owns:   writes `out`, if given, alone, and returns it; int8: a QuantizedKV with scales [n, tile_size].
        Raises: KeyError, naming the key, for one that is not there. Nothing is counted, moved or written then.
        """
        keys = list(keys)
        out = self._tiles.new_batch(len(keys)) if out is None else self._tiles.check_out(out, len(keys))
        with self._lock:
            slots = self._start_reading(keys)
            self._hits += len(keys)
            move_to_end = self._by_key.move_to_end
            for key in keys:
                move_to_end(key)
        try:
            self._tiles.read_batch(slots, out)
        finally:
            self._end_reading(slots)
        return out

    def put(self, key: _AnyKey, tile: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Stores a copy of the tile under the key, in the place of what it named; it is the most recently used then."""
        key = check_tile_key(key)
        content = self._tiles.checked("tile", tile, scales, None)
        slots = self._slots
        with self._lock:
            self._start_change()
            slot = self._by_key.get(key)
            if slot is not None and slots.is_exclusive(slot):
                self._tiles.write(slot, content)
                self._by_key.move_to_end(key)
                return
            if slots.free and not slots.num_reads[slots.free[0]]:
                self._tiles.write(slots.free[0], content)
                slots.publish((key,), (slots.free.popleft(),))
                return
        self._put([key], TileContent(*(None if part is None else part[None] for part in content)))  # type: ignore[arg-type]

    def put_batch(self, keys: Iterable[_AnyKey], tiles: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """Stores tiles [n, tile_size, head_dim] under n keys, all or none; of a key named twice the last tile counts.

        Scales: for int8 codes, [n, tile_size] float32.
        Raises: ValueError for more keys than the capacity.
        """
        checked = list(keys)
        if not self._are_known(checked):
            checked = check_tile_keys(checked)
        content = self._tiles.checked("tiles", tiles, scales, len(checked))
        rows = dict(zip(checked, range(len(checked)), strict=True))
        if len(rows) > self.capacity:
            raise ValueError(f"keys must be at most {self.capacity} (the capacity), got {len(rows)}.")
        if len(rows) < len(checked):
            checked = sorted(rows, key=rows.__getitem__)
            kept = torch.tensor([rows[key] for key in checked])
            content = TileContent(*(None if part is None else part[kept] for part in content))  # type: ignore[arg-type]
        if checked:
            self._put(checked, content)

    def remove(self, key: _AnyKey) -> bool:
        """Forgets the key, pinned or not; says whether it was there."""
        with self._lock:
            self._start_change()
            is_there = self._has(key)
            if is_there:
                self._slots.drop(key)
            return is_there

    def remove_sequence(self, sequence: int) -> int:
        """Forgets all keys of a sequence, and says how many."""
        _check_sequence("sequence", sequence)
        with self._lock:
            self._start_change()
            keys = self._slots.of_sequence(sequence)
            for key in keys:
                self._slots.drop(key)
            return len(keys)

    def clear(self) -> None:
        """Forgets every key; what was counted stays counted."""
        with self._lock:
            self._start_change()
            for key in list(self._by_key):
                self._slots.drop(key)

    def contains(self, key: _AnyKey) -> bool:
        """Whether a tile is there; moves and counts nothing."""
        with self._lock:
            return self._has(key)

    def __contains__(self, key: object) -> bool:
        return self.contains(key)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Keys, which are more than tiles where sequences share."""
        with self._lock:
            self._await_put()
            return len(self._by_key)

    def stats(self) -> HostTileStats:
        """Counts at one moment."""
        with self._lock:
            self._await_put()
            slots = self._slots
            held = self.capacity, slots.num_tiles, len(self._by_key), slots.num_pinned, len(slots.free)
            return HostTileStats(*held, self._hits, self._misses, self._evictions)

    def pin(self, key: _AnyKey) -> None:
        """Keeps the tile from eviction until as many calls of `unpin`. Pins stay with the key, whatever it names."""
        with self._lock:
            self._refuse_while_evicting()
            self._find(key)
            self._slots.pin(key, 1)

    def unpin(self, key: _AnyKey) -> None:
        """Takes one pin off; the key may be gone meanwhile."""
        key = check_tile_key(key)
        with self._lock:
            self._refuse_while_evicting()
            if key not in self._slots.pins_of_key:
                raise ValueError(f"the key to unpin must be pinned, got {key}, which is not.")
            self._slots.pin(key, -1)

    @contextmanager
    def pinned(self, key: _AnyKey) -> Iterator[Tile]:
        """A view of the tile, to be read only: it stays as it is until the end, even if the key is put or removed.

        Raises: KeyError when the key is not there.
        """
        with self._lock:
            self._refuse_while_evicting()
            slot = self._find(key)
            self._by_key.move_to_end(key)
            self._hits += 1
            self._slots.num_views[slot] += 1
        try:
            yield self._tiles.view(slot)
        finally:
            with self._lock:
                self._slots.end_view(slot)

    def fork(self, src: int, dst: int) -> None:
        """Lets sequence `dst`, which must have no tiles, share those of `src`: what either puts later is its own.

        The keys of dst are the most recently used then, in the order in which those of src came to be.
        """
        _check_sequence("src", src)
        _check_sequence("dst", dst)
        with self._lock:
            self._start_change()
            num_keys = len(self._slots.of_sequence(dst))
            if num_keys:
                raise ValueError(f"dst must be a sequence without tiles, got {dst}, which has {num_keys}.")
            self._inherit({dst: src})

    def reorder(self, parents: Mapping[int, int] | Sequence[int]) -> None:
        """Makes each sequence i a fork of what parents[i] was, all at once; a sequence that is its own parent is left.

        Sequences that `parents` gives no parent are left as they are; the tiles that nobody names any more are freed.
        """
        pairs = parents.items() if isinstance(parents, Mapping) else enumerate(parents)
        parent_of = dict(pairs)
        for child, parent in parent_of.items():
            _check_sequence("a sequence to reorder", child)
            _check_sequence(f"parents[{child}]", parent)
        with self._lock:
            self._start_change()
            self._inherit({child: parent for child, parent in parent_of.items() if child != parent})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes keys, their order and their tiles to a file; pins and counts are not kept. See docs/tile_format.md."""
        with self._lock:
            self._await_put()
            keys, named = list(self._by_key), list(self._by_key.values())
            stored = {slot: row for row, slot in enumerate(dict.fromkeys(named))}
            slots = np.array(list(stored), np.int64)
            self._slots.num_reads[slots] += 1
        try:
            tiles = self._tiles.new_batch(len(slots))
            self._tiles.read_batch(slots, tiles)
        finally:
            self._end_reading(slots)
        rows = torch.tensor([stored[slot] for slot in named], dtype=torch.int64)
        content = tuple(tiles) if isinstance(tiles, QuantizedKV) else (tiles,)
        write_tile_file(path, TileRecord(HOST, self._geometry, rows_of_keys(keys), rows, content))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Puts what a file holds in the place of all content, without `on_evict`; all of it or, if that fails, nothing.

        Raises: CorruptPageError for a damaged file; ValueError for one that does not fit, and while anything is pinned.
        """
        record = read_tile_file(path, kind=HOST, geometry=self._geometry, capacity=self.capacity)
        keys, named = keys_of_rows(record.names), record.named.tolist()
        with self._lock:
            self._start_change()
            while self._slots.num_reads.any():
                self._changed.wait()
                self._await_put()
            if self._slots.has_pins:
                raise ValueError("a cache to load into must have nothing pinned, got pins. Unpin them first.")
            self.clear()
            slots = np.array(list(self._slots.free)[: len(record.tiles[0])], np.int64)
            self._tiles.write_batch(slots, TileContent(record.tiles[0], *record.tiles[1:] or (None,)))
            for _ in slots:
                self._slots.free.popleft()
            for key, row in zip(keys, named, strict=True):
                self._slots.name(key, int(slots[row]))

    def _put(self, keys: list[Key], content: TileContent) -> None:
        """Stores checked tiles under distinct keys: takes slots, fills them outside the lock, names them."""
        with self._lock:
            self._start_change()
            wanted = dict.fromkeys(keys)
            self._evict(self._slots.victims(wanted))
            slots, lost = self._slots.reserve(wanted)
            self._rewritten = frozenset(lost)
            self._is_putting = True
        is_written = False
        try:
            ids = np.array(slots, np.int64)
            # No key leads to these slots any more, so their readers become fewer only.
            with self._lock:
                while self._slots.num_reads[ids].any():
                    self._changed.wait()
            self._tiles.write_batch(ids, content)
            is_written = True
        finally:
            with self._lock:
                if is_written:
                    self._slots.publish(keys, slots)
                else:
                    self._slots.free.extend(slots)
                self._is_putting = False
                self._rewritten = frozenset()
                self._changed.notify_all()

    def _are_known(self, keys: list[_AnyKey]) -> bool:
        """Whether all keys are in the books, so that they were checked when they came there."""
        try:
            with self._lock:
                return all(map(self._by_key.__contains__, keys))
        except TypeError:
            return False

    def _evict(self, victims: list[Key]) -> None:
        if self._on_evict is not None:
            self._is_evicting = True
            try:
                for key in victims:
                    self._on_evict(TileKey(*key), self._tiles.copy_of(self._by_key[key])())
            finally:
                self._is_evicting = False
        for key in victims:
            self._slots.drop(key)
        self._evictions += len(victims)

    def _inherit(self, parent_of: dict[int, int]) -> None:
        """Gives each sequence the tiles that its parent has now, in the place of its own."""
        slots = self._slots
        new = [
            ((child, *key[1:]), self._by_key[key])
            for child, parent in parent_of.items()
            for key in slots.of_sequence(parent)
        ]
        # Held meanwhile, so that a slot is not freed between its old name and its new one.
        for _, slot in new:
            slots.num_views[slot] += 1
        for child in parent_of:
            for key in slots.of_sequence(child):
                slots.drop(key)
        for key, slot in new:
            slots.name(key, slot)
            slots.end_view(slot)

    def _start_change(self) -> None:
        """Waits for this writer's turn, under the lock."""
        self._refuse_while_evicting()
        self._await_put()

    def _await_put(self) -> None:
        while self._is_putting:
            self._changed.wait()

    def _refuse_while_evicting(self) -> None:
        # Only the thread that evicts can get here: it has the lock.
        if self._is_evicting:
            raise RuntimeError("on_evict must not change the cache that evicts, got a call that does.")

    def _has(self, key: _AnyKey) -> bool:
        """Whether the key is there, under the lock; checks the key, and waits while its slot is being written again."""
        key = check_tile_key(key)
        while key in self._rewritten:
            self._changed.wait()
        return key in self._by_key

    def _find(self, key: _AnyKey) -> int:
        if not self._has(key):
            raise _missing(key)
        return self._by_key[key]

    def _start_reading(self, keys: list[_AnyKey]) -> np.ndarray:
        """The slots of the keys, marked as being read, under the lock."""
        try:
            slots = np.array([self._by_key[key] for key in keys], np.int64)
        except (KeyError, TypeError):
            checked = check_tile_keys(keys)
            while not self._rewritten.isdisjoint(checked):
                self._changed.wait()
            for key in checked:
                if key not in self._by_key:
                    raise _missing(key) from None
            slots = np.array([self._by_key[key] for key in checked], np.int64)
        # A slot that is named twice counts once here, and once at the end.
        self._slots.num_reads[slots] += 1
        return slots

    def _end_reading(self, slots: np.ndarray) -> None:
        with self._lock:
            self._slots.num_reads[slots] -= 1
            self._changed.notify_all()


def _missing(key: _AnyKey) -> KeyError:
    return KeyError(f"tile {TileKey(*key)} is not in the cache; contains() tells before.")


def _check_sequence(name: str, sequence: object) -> None:
    check_int(name, sequence, minimum=0)
    if isinstance(sequence, int) and sequence > MAX_INDEX:
        raise ValueError(f"{name} must be at most {MAX_INDEX}, got {sequence}.")
