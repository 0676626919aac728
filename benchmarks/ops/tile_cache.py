"""HostTileCache: batches beside the plain copy of as many bytes, one tile beside a clone of it or a copy_ of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from pagedkv.storage.tiles.host_tile_cache import HostTileCache

from ..case import OURS, Case, CaseSpec, Ceiling, Options, Run, WrongResultError

__all__ = ["cases"]

_NUM_TILES, _TILE_SIZE, _HEAD_DIM = 4096, 16, 128
_SINGLE_REPEATS = 1000


def cases(options: Options) -> Iterator[CaseSpec]:
    """Batches of a layer of a long prompt, and a single tile; one layout, since tiles have no heads."""
    shape = f"P{_TILE_SIZE}-D{_HEAD_DIM}-f32"
    yield CaseSpec("tile_put_batch", f"n{_NUM_TILES}-{shape}", partial(_put_batch, capacity=2 * _NUM_TILES))
    yield CaseSpec("tile_put_batch", f"n{_NUM_TILES}-{shape}-full", partial(_put_batch, capacity=_NUM_TILES))
    yield CaseSpec("tile_put_batch", f"n{_NUM_TILES}-{shape}-evict", _put_batch_evicting)
    yield CaseSpec("tile_get_batch", f"n{_NUM_TILES}-{shape}-out", partial(_get_batch, has_out=True))
    yield CaseSpec("tile_get_batch", f"n{_NUM_TILES}-{shape}-new", partial(_get_batch, has_out=False))
    yield CaseSpec("tile_get", f"n1-{shape}", _get)
    yield CaseSpec("tile_put", f"n1-{shape}", _put)


class _World:
    """A cache whose keys are asked for in another order than they were put in; by default with twice the room."""

    def __init__(self, capacity: int = 2 * _NUM_TILES) -> None:
        self.tiles = torch.randn(_NUM_TILES, _TILE_SIZE, _HEAD_DIM)
        self.order = torch.randperm(_NUM_TILES)
        keys = [(row // 512, row // 64 % 8, row // 2 % 32, "kv"[row % 2]) for row in range(_NUM_TILES)]
        self.keys = [keys[row] for row in self.order.tolist()]
        self.cache = HostTileCache(capacity, _TILE_SIZE, _HEAD_DIM)
        self.cache.put_batch(keys, self.tiles)
        self.num_bytes = self.tiles.numel() * self.tiles.element_size()

    def check(self, read: object, expected: torch.Tensor) -> None:
        if not (isinstance(read, torch.Tensor) and torch.equal(read, expected)):
            raise WrongResultError("tiles read differ from the tiles put")


def _put_batch(capacity: int) -> Case:
    """The same keys again and again: into the other half of the slots, or over their own tiles where it is full."""
    world = _World(capacity)
    slab = torch.zeros_like(world.tiles)

    def ours(i: int) -> None:
        world.cache.put_batch(world.keys, world.tiles)

    def index_copy(i: int) -> None:
        slab.index_copy_(0, world.order, world.tiles)

    def check() -> None:
        ours(0)
        world.check(world.cache.get_batch(world.keys), world.tiles)

    return Case({OURS: ours, "index_copy_": index_copy}, check, [Ceiling("copy", world.num_bytes)])


def _put_batch_evicting() -> Case:
    """Two sets of keys in turn, of which the cache holds one."""
    world = _World(_NUM_TILES)
    others = [(sequence + 100, *place) for sequence, *place in world.keys]
    slab = torch.zeros_like(world.tiles)
    num_calls = 0

    def ours(i: int) -> None:
        nonlocal num_calls
        num_calls += 1
        world.cache.put_batch(others if num_calls % 2 else world.keys, world.tiles)

    def index_copy(i: int) -> None:
        slab.index_copy_(0, world.order, world.tiles)

    def check() -> None:
        ours(0)
        world.check(world.cache.get_batch(others), world.tiles)

    return Case({OURS: ours, "index_copy_": index_copy}, check, [Ceiling("copy", world.num_bytes)])


def _get_batch(has_out: bool) -> Case:
    world = _World()
    out = torch.zeros_like(world.tiles) if has_out else None

    def ours(i: int) -> object:
        return world.cache.get_batch(world.keys, out=out)

    def index_select(i: int) -> object:
        return torch.index_select(world.tiles, 0, world.order, out=out)

    def check() -> None:
        world.check(ours(0), world.tiles[world.order])

    return Case({OURS: ours, "index_select": index_select}, check, [Ceiling("copy", world.num_bytes)])


def _get() -> Case:
    world = _World()
    cache, keys, tiles = world.cache, world.keys[:_SINGLE_REPEATS], list(world.tiles)

    def ours(i: int) -> object:
        return cache.get(keys[i])

    def clone(i: int) -> object:
        return tiles[i].clone()

    def check() -> None:
        for i in range(_SINGLE_REPEATS):
            world.check(ours(i), tiles[int(world.order[i])])

    return Case({OURS: _repeated(ours), "clone": _repeated(clone)}, check, repeats=_SINGLE_REPEATS)


def _put() -> Case:
    world = _World()
    cache, keys, tiles = world.cache, world.keys[:_SINGLE_REPEATS], list(world.tiles)
    slab = list(torch.zeros_like(world.tiles))

    def ours(i: int) -> None:
        cache.put(keys[i], tiles[i])

    def copy(i: int) -> object:
        return slab[i].copy_(tiles[i])

    def check() -> None:
        for i in range(_SINGLE_REPEATS):
            ours(i)
            world.check(cache.get(keys[i]), tiles[i])

    return Case({OURS: _repeated(ours), "copy_": _repeated(copy)}, check, repeats=_SINGLE_REPEATS)


def _repeated(run: Run) -> Run:
    """`run` for every tile of a round."""

    def repeated(i: int) -> None:
        for row in range(_SINGLE_REPEATS):
            run(row)

    return repeated
