"""HostTileCache under input that is odd: other defaults of torch, keys that are only equal, memory that overlaps."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from pagedkv.storage.tiles.host_tile_cache import HostTileCache
from pagedkv.testing.bits import same_bits

A, B, C = ((0, 0, index, "k") for index in range(3))


def cache_of(*keys, **options):
    """A cache of 3 tiles that holds the keys, the tile of the first full of 1, of the next full of 2 and so on."""
    cache = HostTileCache(3, 3, 5, **options)
    for value, key in enumerate(keys, start=1):
        cache.put(key, torch.full((3, 5), float(value)))
    return cache


def order(cache):
    return list(cache._by_key)


def state(cache):
    """All that a failed call must leave: keys in their order, contents, counts."""
    return [(key, cache._tiles.view(slot).tolist()) for key, slot in cache._by_key.items()], cache.stats()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_default_device_and_dtype_do_not_matter(tmp_path, dtype):
    tiles = torch.arange(30, dtype=torch.float32).view(2, 3, 5)
    with torch.device("meta"):
        cache = HostTileCache(3, 3, 5, dtype=dtype)
        cache.put(C, tiles[0])
        cache.put_batch([A, B, A], torch.stack([tiles[0], tiles[1], tiles[1]]))
        cache.save(tmp_path / "tiles")
        cache.load(tmp_path / "tiles")
        read = cache.get_batch([A, B]), cache.get(C)
    values = [part.values if dtype == torch.int8 else part for part in read]
    assert [part.device.type for part in values] == ["cpu", "cpu"]
    assert same_bits(values[0][0], values[0][1])
    assert values[1].any()


def test_what_get_gives_can_be_put():
    cache = HostTileCache(3, 3, 5, dtype=torch.int8)
    cache.put(A, torch.randn(3, 5))
    cache.put(B, cache.get(A))
    cache.put_batch([C, A], cache.get_batch([A, B]))
    assert all(same_bits(*parts) for parts in zip(cache.get(A), cache.get(C), strict=True))
    with pytest.raises(ValueError, match="scales must be None where tile is a QuantizedKV"):
        cache.put(A, cache.get(B), torch.ones(3))


@pytest.mark.parametrize("key", [(True, 0, 0, "k"), (1.0, 0, 0, "k"), (np.int64(1), 0, 0, "k")], ids=str)
def test_keys_in_the_books_are_plain_whatever_they_were_found_by(key):
    cache = HostTileCache(2, 3, 5)
    cache.put((1, 0, 0, "k"), torch.zeros(3, 5))
    cache.put_batch([key], torch.ones(1, 3, 5))
    assert cache.get((1, 0, 0, "k")).all()
    assert [type(part) for part in cache.keys_of(1)[0]] == [int, int, int, str]
    with pytest.raises(TypeError, match="of a tile key must be an int"):
        cache.put_batch([key, (key[0], 5, 0, "k")], torch.ones(2, 3, 5))
    assert len(cache) == 1


@pytest.mark.parametrize("odd", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_tiles_that_are_not_dense_are_refused_before_anything_goes(odd):
    cache = cache_of(A, on_evict=lambda key, tile: pytest.fail("evicted"))
    before = state(cache)
    for key in (A, C):
        with pytest.raises(TypeError, match="must be a dense tensor"):
            cache.put_batch([key], odd(torch.ones(1, 3, 5)))
        with pytest.raises(TypeError, match="must be a dense tensor"):
            cache.put(key, odd(torch.ones(3, 5)))
    assert state(cache) == before


def test_results_over_the_tiles_of_the_cache_are_refused():
    cache = cache_of(A, B)
    before = state(cache)
    with cache.pinned(A) as view, pytest.raises(ValueError, match="out must not overlap tiles of the cache"):
        cache.get_batch([B], out=view[None])
    crossed = torch.zeros(40).as_strided((2, 3, 5), (3, 5, 1))
    with pytest.raises(ValueError, match="out must not overlap itself"):
        cache.get_batch([A, B], out=crossed)
    assert sorted(state(cache)[0]) == sorted(before[0])


def test_parents_of_every_kind():
    for parents in ({1: 0}, [0, 0], torch.tensor([0, 0]), iter([0, 0])):
        cache = cache_of(A)
        cache.reorder(parents)
        assert cache.contains((1, *A[1:]))
    with pytest.raises(TypeError, match="parents must be a mapping or an iterable of sequences, got NoneType"):
        cache.reorder(None)
    with pytest.raises(ValueError, match="dst must be another sequence than src, got 7"):
        cache.fork(7, 7)


def test_the_keys_of_a_sequence():
    cache = cache_of(A, B)
    before = order(cache)
    assert cache.keys_of(A[0]) == [key for key in (A, B) if key[0] == A[0]]
    assert cache.keys_of(99) == []
    assert order(cache) == before


def test_memory_that_anyone_refers_to_is_not_handed_out_again():
    cache = HostTileCache(300, 16, 128)
    keys = [(0, 0, tile, "k") for tile in range(200)]
    cache.put_batch(keys, torch.ones(200, 16, 128))
    address = cache.get_batch(keys).data_ptr()
    again = cache.get_batch(keys)
    assert again.data_ptr() == address  # it is reused at all
    storage = again.untyped_storage()
    del again
    third = cache.get_batch(keys)
    assert third.data_ptr() != storage.data_ptr()
    view = third[3:5]
    del third
    assert cache.get_batch(keys).data_ptr() != view.data_ptr() - 3 * 16 * 128 * 4


@pytest.mark.parametrize("key", [A, C], ids=["there", "new"])
def test_tiles_without_memory_are_refused_before_anything_goes(key):
    cache = cache_of(A, B, (0, 0, 7, "k"))
    before = state(cache)
    freed = torch.ones(3, 5)
    batch = freed[None]
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.ones(3, 5)
        fake_batch = torch.ones(1, 3, 5)
    for tile, tiles in ((freed, batch), (fake, fake_batch)):
        with pytest.raises(ValueError, match="must have memory, got a .*Tensor of 15 elements without"):
            cache.put_batch([key], tiles)
        with pytest.raises(ValueError, match="must have memory, got a .*Tensor of 15 elements without"):
            cache.put(key, tile)
    assert state(cache) == before


def test_a_cache_is_not_copied_or_pickled():
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a tile cache must stay where it is"):
            attempt(cache_of(A))


@pytest.mark.parametrize("keys", [None, 7], ids=str)
def test_keys_that_are_none(keys):
    with pytest.raises(TypeError, match=f"keys must be an iterable of tile keys, got {type(keys).__name__}"):
        cache_of(A).get_batch(keys)
    with pytest.raises(TypeError, match=f"keys must be an iterable of tile keys, got {type(keys).__name__}"):
        cache_of(A).put_batch(keys, torch.ones(1, 3, 5))
    with pytest.raises(ValueError, match="part of a tile must be 'k' or 'v', got array"):
        cache_of(A).get((0, 0, 9, np.zeros(2)))
