"""Tiles in host memory by key: the least recently used one goes first, what is pinned stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from ...shapes import check_int
from .host_file import load_host_tiles, save_host_tiles
from .host_keys import check_tile_keys
from .host_slots import HostSlots, Key, SlotIds
from .host_tiles import HostTiles, Tile, TileContent
from .host_turns import HostTurns
from .host_victims import choose_victims
from .tile_geometry import TileGeometry
from .tile_key import MAX_INDEX, TileKey, check_tile_key

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


class _UnknownKeysError(Exception):
    """A put cannot go on before its keys are checked."""


class HostTileCache:
    """Up to `capacity` tiles of [tile_size, head_dim] in RAM, each by itself: keys and values are two tiles.

    Keys:    TileKey, or a tuple (sequence, head, tile, "k" or "v").
    Dtypes:  float32, float16, bfloat16: moved bitwise. int8: float tiles are quantised by the rule of `quantize_kv`, a
             scale a token; codes with scales [tile_size] float32 are moved bitwise. What is read is a QuantizedKV then,
             and can be put as it is.
    Evicts:  a put without room drops keys, the least recently used first, until there is; never a pinned tile and never
             a key of the same put. `on_evict(key, tile)` gets each before any is dropped, with a copy of its own; what
             it raises fails the put, and nothing has changed. Inside of it the cache may be read, not changed.
    Owns:    what get and get_batch return is the caller's. `pinned` gives a view that stays as it is meanwhile.
    Threads: any number may read and write. One lock is over the books and over the copy of a single tile; batches are
             copied outside of it, from slots that are noted as being read to slots that are noted as being written. So
             readers do not wait for each other's batches; writers take turns, and a reader waits for a batch that is
             being put only where it asks for a tile that this writes over. `on_evict` runs under the lock. A signal
             handler or finalizer in the midst of a call may `get` what that call does not write over; a change raises
             RuntimeError.
    Interrupts (KeyboardInterrupt and the like): the books stay whole, and every tile that can be read is one that was
             put. A put that is interrupted may be done, or not, or have cost tiles: those that it evicted and those
             that it wrote over; a load, all.
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
        self._copy = self._tiles.copy
        self._slots = HostSlots(capacity)
        self._turns = HostTurns(self._slots)
        self._lock, self._by_key = self._turns.lock, self._slots.by_key
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
            turns = self._turns
            # Nothing is being put, nor was a put interrupted, and no other call is in the midst of the books.
            if self._slots.is_whole and not turns.depth:
                try:
                    turns.depth = 1
                    self._by_key.move_to_end(key)
                    tile = self._copy(self._by_key[key])
                    self._hits += 1
                    return tile
                except (KeyError, TypeError):
                    pass
                finally:
                    turns.depth = 0
        return self._get(check_tile_key(key))

    def get_batch(self, keys: Iterable[_AnyKey], out: Tile | None = None) -> Tile:
        """Copies of n tiles, [n, tile_size, head_dim]; the last key is the most recently used then.

        Owns:   writes `out`, if given, alone, and returns it; int8: a QuantizedKV with scales [n, tile_size].
        Raises: KeyError, naming the key, for one that is not there. Nothing is counted, moved or written then.
        """
        keys = _listed(keys)
        out = self._tiles.new_batch(len(keys)) if out is None else self._tiles.check_out(out, len(keys))
        self._turns.read(lambda: self._find_batch(keys), lambda slots: self._tiles.read_batch(slots, out))
        return out

    def put(self, key: _AnyKey, tile: Tile, scales: torch.Tensor | None = None) -> None:
        """Stores a copy of the tile under the key, in the place of what it named; it is the most recently used then."""
        key = check_tile_key(key)
        content = self._tiles.checked("tile", tile, scales, None)
        if not self._turns.change(lambda: self._put_in_place(key, content)):
            self._put([key], TileContent(*(None if part is None else part[None] for part in content)), self._slots.find)  # type: ignore[arg-type]

    def put_batch(self, keys: Iterable[_AnyKey], tiles: Tile, scales: torch.Tensor | None = None) -> None:
        """Stores tiles [n, tile_size, head_dim] under n keys, all or none; of a key named twice the last tile counts.

        Scales: for int8 codes, [n, tile_size] float32.
        Raises: ValueError for more keys than the capacity.
        """
        keys = _listed(keys)
        content = self._tiles.checked("tiles", tiles, scales, len(keys))
        try:
            self._put(keys, content, self._find_known)
        except _UnknownKeysError:
            checked, content = _last_of_each(check_tile_keys(keys), content)
            if len(checked) > self.capacity:
                raise ValueError(f"keys must be at most {self.capacity} (the capacity), got {len(checked)}.") from None
            if checked:
                self._put(checked, content, self._slots.find)

    def remove(self, key: _AnyKey) -> bool:
        """Forgets the key, pinned or not; says whether it was there."""
        key = check_tile_key(key)
        return self._turns.change(lambda: self._slots.drop([key] if key in self._by_key else [])) > 0

    def remove_sequence(self, sequence: int) -> int:
        """Forgets all keys of a sequence, and says how many."""
        _check_sequence("sequence", sequence)
        return self._turns.change(lambda: self._slots.drop(self._slots.of_sequence(sequence)))

    def clear(self) -> None:
        """Forgets every key; what was counted stays counted."""
        self._turns.change(lambda: self._slots.drop(list(self._by_key)))

    def contains(self, key: _AnyKey) -> bool:
        """Whether a tile is there; moves and counts nothing."""
        with self._lock:
            return check_tile_key(key) in self._by_key

    def keys_of(self, sequence: int) -> list[TileKey]:
        """The keys of a sequence, in the order in which they came to be; moves and counts nothing."""
        _check_sequence("sequence", sequence)
        keys = self._turns.change(lambda: self._slots.of_sequence(sequence))
        return [TileKey(*key) for key in keys]

    def __contains__(self, key: object) -> bool:
        return self.contains(key)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Keys, which are more than tiles where sequences share."""
        with self._lock:
            self._turns.await_put()
            return len(self._by_key)

    def stats(self) -> HostTileStats:
        """Counts at one moment."""
        with self._lock:
            self._turns.await_put()
            slots = self._slots
            held = self.capacity, slots.num_tiles, len(self._by_key), slots.num_pinned, len(slots.free)
            return HostTileStats(*held, self._hits, self._misses, self._evictions)

    def pin(self, key: _AnyKey) -> None:
        """Keeps the tile from eviction until as many calls of `unpin`. Pins stay with the key, whatever it names."""
        key = check_tile_key(key)
        self._turns.look_when_whole(key, lambda slot: self._pin(key, slot), pins=True)

    def unpin(self, key: _AnyKey) -> None:
        """Takes one pin off; the key may be gone meanwhile."""
        key = check_tile_key(key)
        self._turns.pin(lambda: self._unpin(key))

    @contextmanager
    def pinned(self, key: _AnyKey) -> Iterator[Tile]:
        """A view of the tile, to be read only: it stays as it is until the end, even if the key is put or removed.

        Raises: KeyError when the key is not there.
        """
        key, view = check_tile_key(key), object()
        try:
            slot = self._turns.look_when_whole(key, lambda slot: self._start_view(view, key, slot), pins=True)
            yield self._tiles.view(slot)
        finally:
            self._slots.ended_views.append(view)

    def fork(self, src: int, dst: int) -> None:
        """Lets sequence `dst`, which must have no tiles, share those of `src`: what either puts later is its own.

        The keys of dst are the most recently used then, in the order in which those of src came to be.
        """
        _check_sequence("src", src)
        _check_sequence("dst", dst)
        if src == dst:
            raise ValueError(f"dst must be another sequence than src, got {dst} for both.")
        self._turns.change(lambda: self._fork(src, dst))

    def reorder(self, parents: Mapping[int, int] | Iterable[int] | torch.Tensor) -> None:
        """Makes each sequence i a fork of what parents[i] was, all at once; a sequence that is its own parent is left.

        Sequences that `parents` gives no parent are left as they are; the tiles that nobody names any more are freed.
        """
        parent_of = _parent_of(parents)
        for child, parent in parent_of.items():
            _check_sequence("a sequence to reorder", child)
            _check_sequence(f"parents[{child}]", parent)
        moved = {child: parent for child, parent in parent_of.items() if child != parent}
        self._turns.change(lambda: self._slots.inherit(moved))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes keys, their order and their tiles to a file; pins and counts are not kept. See docs/tile_format.md."""
        save_host_tiles(path, self._geometry, self._slots, self._tiles, self._turns)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Puts what a file holds in the place of all content, without `on_evict`; all of it or, if that fails, nothing.

        Raises: CorruptPageError for a damaged file; ValueError for one that does not fit, and while anything is pinned.
        """
        load_host_tiles(path, self._geometry, self._slots, self._tiles, self._turns)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a tile cache must stay where it is, got a call of copy or pickle. Use save and load.")

    def _get(self, key: Key) -> Tile | None:
        """What `get` gives where there is more to do than to copy."""

        def copy(slot: int | None) -> Tile | None:
            if slot is None:
                self._misses += 1
                return None
            self._touch([key])
            self._hits += 1
            return self._copy(slot)

        return self._turns.look_when_whole(key, copy)

    def _put_in_place(self, key: Key, content: TileContent) -> bool:
        """Writes over the tile of the key, if nobody else can see it; returns whether."""
        slot = self._by_key.get(key)
        if slot is None or self._turns.reads or not self._slots.is_exclusive(slot):
            return False
        self._slots.start_rewriting(slot)
        self._tiles.write(slot, content)
        self._slots.end_rewriting(slot)
        self._by_key.move_to_end(key)
        return True

    def _put(self, keys: list[Key], content: TileContent, find: Callable[[list[Key]], SlotIds]) -> None:
        """Stores tiles under distinct checked keys; `find` gives the slot of each, -1 for none."""
        slots = self._slots
        held = np.empty(0, np.int64)

        def start() -> SlotIds:
            nonlocal held
            held = find(keys)
            self._evict(choose_victims(slots, keys, held))
            return slots.reserve(held)

        self._turns.write(
            start,
            lambda targets: self._tiles.write_batch(targets, content),
            lambda targets: slots.publish(keys, held, targets),
        )

    def _find_known(self, keys: list[Key]) -> SlotIds:
        """The slots of keys that need no check, since they are all in the books, where checked ones alone come to be.

        Raises: _UnknownKeysError for keys that need one, and where two name one slot: they may be the same.
        """
        try:
            held = self._slots.find_all(keys)
        except (KeyError, TypeError):
            raise _UnknownKeysError from None
        if not held.size or not self._slots.are_distinct(held):
            raise _UnknownKeysError
        return held

    def _evict(self, victims: list[Key]) -> None:
        if self._on_evict is not None:
            for key in victims:
                self._on_evict(TileKey(*key), self._copy(self._by_key[key]))
        self._slots.drop(victims)
        self._evictions += len(victims)

    def _fork(self, src: int, dst: int) -> None:
        num_keys = len(self._slots.of_sequence(dst))
        if num_keys:
            raise ValueError(f"dst must be a sequence without tiles, got {dst}, which has {num_keys}.")
        self._slots.inherit({dst: src})

    def _pin(self, key: Key, slot: int | None) -> None:
        if slot is None:
            raise _missing(key)
        self._slots.pin(key, 1)

    def _unpin(self, key: Key) -> None:
        if key not in self._slots.pins_of_key:
            raise ValueError(f"the key to unpin must be pinned, got {key}, which is not.")
        self._slots.pin(key, -1)

    def _start_view(self, view: object, key: Key, slot: int | None) -> int:
        if slot is None:
            raise _missing(key)
        self._slots.start_view(view, slot)
        self._by_key.move_to_end(key)
        self._hits += 1
        return slot

    def _find_batch(self, keys: list[_AnyKey]) -> SlotIds:
        slots = self._slots_of(keys)
        self._hits += len(keys)
        self._touch(keys)
        return slots

    def _touch(self, keys: Sequence[_AnyKey]) -> None:
        """Makes keys the most recently used, within `look`, unless this is called by another call."""
        if self._turns.depth == 1:
            self._slots.touch(keys)

    def _slots_of(self, keys: list[_AnyKey]) -> SlotIds:
        by_key = self._by_key
        try:
            return self._slots.find_all(keys)
        except (KeyError, TypeError):
            for key in check_tile_keys(keys):
                if key not in by_key:
                    raise _missing(key) from None
            raise


def _listed(keys: Iterable[_AnyKey]) -> list[_AnyKey]:
    if not isinstance(keys, Iterable):
        raise TypeError(f"keys must be an iterable of tile keys, got {type(keys).__name__}.")
    return list(keys)


def _last_of_each(keys: list[Key], content: TileContent) -> tuple[list[Key], TileContent]:
    """Each key once, with the tile that comes last."""
    rows = dict(zip(keys, range(len(keys)), strict=True))
    if len(rows) == len(keys):
        return keys, content
    keys = sorted(rows, key=rows.__getitem__)
    kept = torch.tensor([rows[key] for key in keys], dtype=torch.int64, device="cpu")
    return keys, TileContent(*(None if part is None else part[kept] for part in content))  # type: ignore[arg-type]


def _missing(key: _AnyKey) -> KeyError:
    return KeyError(f"tile {TileKey(*key)} is not in the cache; contains() tells before.")


def _parent_of(parents: object) -> dict[int, int]:
    """The parent of each sequence that has one."""
    if isinstance(parents, (torch.Tensor, np.ndarray)):
        parents = parents.tolist()
    if isinstance(parents, Mapping):
        return dict(parents)
    if not isinstance(parents, Iterable):
        raise TypeError(f"parents must be a mapping or an iterable of sequences, got {type(parents).__name__}.")
    return dict(enumerate(parents))


def _check_sequence(name: str, sequence: object) -> None:
    check_int(name, sequence, minimum=0)
    if isinstance(sequence, int) and sequence > MAX_INDEX:
        raise ValueError(f"{name} must be at most {MAX_INDEX}, got {sequence}.")
