"""HostTileCache: what it holds, in which order it forgets, and that whatever fails changes nothing."""

import itertools

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pagedkv import CorruptPageError, OutOfPagesError, QuantizedKV, quantize_kv
from pagedkv.storage.tiles.host_slots import HostSlots
from pagedkv.storage.tiles.host_tile_cache import HostTileCache
from pagedkv.storage.tiles.tile_key import TileKey

A, B, C, D = ((0, 0, index, "k") for index in range(4))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tile(value, tile_size=3, head_dim=5, dtype=torch.float32):
    return torch.full((tile_size, head_dim), float(value), dtype=dtype)


def cache_of(*keys, capacity=3, **options):
    """A cache that holds the keys, the tile of the first full of 1, of the next full of 2 and so on."""
    cache = HostTileCache(capacity, 3, 5, **options)
    for value, key in enumerate(keys, start=1):
        cache.put(key, tile(value))
    return cache


def order(cache):
    return list(cache._by_key)


def state(cache):
    """All that a failed call must leave: keys in their order, contents, counts."""
    return [(key, cache._tiles.view(slot).tolist()) for key, slot in cache._by_key.items()], cache.stats()


# Contents


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_size, head_dim", [(1, 1), (16, 128), (7, 3)])
def test_get_gives_the_bits_that_were_put(dtype, tile_size, head_dim):
    cache = HostTileCache(2, tile_size, head_dim, dtype=dtype)
    key, value = torch.randn(2, tile_size, head_dim).to(dtype)
    key[0, 0], value[0, 0] = torch.nan, -0.0
    cache.put((1, 2, 3, "k"), key)
    cache.put(TileKey(1, 2, 3, "v"), value)
    for part, stored in (("k", key), ("v", value)):
        read = cache.get((1, 2, 3, part))
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), stored.view(torch.uint8))
    assert cache.get((1, 2, 4, "k")) is None


def test_what_get_gives_is_the_callers_own():
    cache = cache_of(A)
    read, batch = cache.get(A), cache.get_batch([A])
    read.zero_()
    batch.zero_()
    assert torch.equal(cache.get(A), tile(1))
    cache.put(A, tile(9))
    assert not read.any()
    assert not read.is_inference()
    assert not batch.is_inference()


def test_a_put_copies_strided_tiles():
    cache = HostTileCache(2, 3, 5)
    source = torch.randn(2, 5, 3)
    cache.put(A, source[0].T)
    assert torch.equal(cache.get(A), source[0].T)
    cache.put_batch([A, B], source.transpose(1, 2))
    assert torch.equal(cache.get_batch([A, B]), source.transpose(1, 2))
    source.zero_()
    assert cache.get(B).any()


@pytest.mark.parametrize("num_tiles", [0, 1, 2, 7, 8])
def test_batches_of_every_length(num_tiles):
    cache = HostTileCache(8, 3, 5)
    keys = [(index % 2, index % 3, index, "kv"[index % 2]) for index in range(num_tiles)]
    tiles = torch.randn(num_tiles, 3, 5)
    cache.put_batch(iter(keys), tiles)
    assert torch.equal(cache.get_batch(keys[::-1]), tiles.flip(0))
    out = torch.empty(num_tiles, 3, 5)
    assert cache.get_batch(keys, out=out) is out
    assert torch.equal(out, tiles)
    assert len(cache) == num_tiles


def test_get_batch_fills_a_strided_out_and_nothing_beside_it():
    cache = cache_of(A, B)
    wide = torch.zeros(2, 3, 7)
    cache.get_batch([B, A], out=wide[:, :, 1:6])
    assert wide[:, :, 1:6].amax(dim=(1, 2)).tolist() == [2, 1]
    assert not wide[:, :, [0, 6]].any()


def test_get_batch_may_name_a_tile_twice():
    cache = cache_of(A, B)
    assert cache.get_batch([A, B, A]).amax(dim=(1, 2)).tolist() == [1, 2, 1]
    assert order(cache) == [B, A]
    assert not cache._turns.reads


def test_of_a_key_put_twice_the_last_tile_counts():
    cache = HostTileCache(2, 3, 5)
    cache.put_batch([A, B, A], torch.stack([tile(1), tile(2), tile(3)]))
    assert order(cache) == [B, A]
    assert torch.equal(cache.get(A), tile(3))
    assert torch.equal(cache.get(B), tile(2))


def test_works_inside_and_outside_of_inference_mode():
    with torch.inference_mode():
        cache = cache_of(A)
    cache.put(A, tile(2))
    cache.put_batch([B], tile(3)[None])
    with torch.inference_mode():
        cache.put(A, tile(4))
        assert torch.equal(cache.get_batch([A, B]), torch.stack([tile(4), tile(3)]))
    assert torch.equal(cache.get(A), tile(4))


# int8


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_quantises_by_the_rule_of_quantize_kv(dtype):
    cache = HostTileCache(4, 3, 5, dtype=torch.int8)
    tiles = torch.randn(2, 3, 5).to(dtype)
    tiles[0, 1] = 0
    values, scales = quantize_kv(tiles.view(6, 1, 5), torch.int8)
    cache.put(A, tiles[0])
    cache.put_batch([B, C], tiles.mT.contiguous().mT)
    for row, key in ((0, A), (0, B), (1, C)):
        read = cache.get(key)
        assert isinstance(read, QuantizedKV)
        assert torch.equal(read.values, values.view(2, 3, 5)[row])
        assert torch.equal(read.scales, scales.view(2, 3)[row])


def test_int8_codes_and_scales_are_moved_bitwise():
    cache = HostTileCache(4, 3, 5, dtype=torch.int8)
    codes, scales = torch.randint(-128, 128, (2, 3, 5), dtype=torch.int8), torch.rand(2, 3)
    scales[1, 2] = torch.nan
    cache.put_batch([A, B], codes, scales)
    cache.put(C, codes[1], scales[1])
    out = QuantizedKV(torch.empty(3, 3, 5, dtype=torch.int8), torch.empty(3, 3))
    read = cache.get_batch([A, B, C], out=out)
    assert read.values is out.values
    assert torch.equal(out.values, codes[[0, 1, 1]])
    assert torch.equal(out.scales.view(torch.int32), scales[[0, 1, 1]].view(torch.int32))
    with cache.pinned(C) as view:
        assert torch.equal(view.values, codes[1])
    cache.put_batch([A, B, A], codes[[0, 0, 1]], scales[[0, 0, 1]])
    assert torch.equal(cache.get(A).values, codes[1])
    cache.put_batch([], codes[:0], scales[:0])
    cache.put_batch([], torch.empty(0, 3, 5))


# Order and eviction


def test_the_least_recently_used_goes_first():
    cache = cache_of(A, B, C)
    cache.get(A)
    cache.put(D, tile(4))
    assert order(cache) == [C, A, D]
    cache.get_batch([C])
    cache.put(B, tile(5))
    assert order(cache) == [D, C, B]
    stats = cache.stats()
    assert (stats.capacity, stats.num_tiles, stats.num_keys, stats.num_pinned, stats.num_free) == (3, 3, 3, 0, 0)
    assert (stats.hits, stats.misses, stats.evictions) == (2, 0, 2)


def test_contains_counts_and_moves_nothing():
    cache = cache_of(A, B)
    before = state(cache)
    assert A in cache
    assert cache.contains(B)
    assert C not in cache
    assert state(cache) == before


def test_on_evict_gets_copies_before_anything_is_dropped():
    seen = []

    def on_evict(key, evicted):
        assert key in cache
        assert torch.equal(cache.get_batch([key])[0], evicted)
        seen.append((key, evicted))

    cache = cache_of(A, B, C, on_evict=on_evict)
    cache.put_batch([D, C], torch.stack([tile(4), tile(5)]))
    cache.put_batch([A, B], torch.stack([tile(6), tile(7)]))
    assert [key for key, _ in seen] == [A, D]
    assert isinstance(seen[0][0], TileKey)
    assert [evicted.amax().item() for _, evicted in seen] == [1, 4]


def test_an_on_evict_that_raises_fails_the_put_and_changes_nothing():
    def on_evict(key, evicted):
        if key == B:
            raise OSError("disk full")

    cache = cache_of(A, B, C, on_evict=on_evict)
    before = state(cache)
    with pytest.raises(OSError, match="disk full"):
        cache.put_batch([D, (9, 9, 9, "v")], torch.zeros(2, 3, 5))
    assert state(cache) == before
    cache.put(D, tile(4))
    assert order(cache) == [B, C, D]


CHANGES = {
    "put": lambda cache: cache.put(A, tile(0)),
    "put_batch": lambda cache: cache.put_batch([A], tile(0)[None]),
    "remove": lambda cache: cache.remove(A),
    "remove_sequence": lambda cache: cache.remove_sequence(0),
    "clear": lambda cache: cache.clear(),
    "pin": lambda cache: cache.pin(A),
    "unpin": lambda cache: cache.unpin(B),
    "pinned": lambda cache: cache.pinned(A).__enter__(),
    "fork": lambda cache: cache.fork(0, 1),
    "reorder": lambda cache: cache.reorder([0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_on_evict_must_not_change_the_cache(change):
    cache = cache_of(A, B, C, on_evict=lambda key, evicted: change(cache))
    cache.pin(B)
    before = state(cache)
    with pytest.raises(RuntimeError, match="must not be changed in the midst of a call"):
        cache.put(D, tile(4))
    assert state(cache) == before
    cache.remove(C)
    cache.put(D, tile(4))


def test_a_batch_never_evicts_what_it_puts():
    cache = cache_of(A, B, C)
    cache.put_batch([D, A], torch.stack([tile(4), tile(5)]))
    assert order(cache) == [C, D, A]
    assert torch.equal(cache.get_batch([D, A]), torch.stack([tile(4), tile(5)]))


def test_a_batch_of_the_capacity_takes_the_place_of_all():
    cache = cache_of(A, B, C)
    cache.put_batch([A, B, C], torch.stack([tile(7), tile(8), tile(9)]))
    assert cache.stats().evictions == 0
    assert cache.get_batch([A, B, C]).amax(dim=(1, 2)).tolist() == [7, 8, 9]
    others = [(5, 0, index, "v") for index in range(3)]
    cache.put_batch(others, torch.zeros(3, 3, 5))
    assert order(cache) == others
    with pytest.raises(ValueError, match=r"keys must be at most 3 \(the capacity\), got 4"):
        cache.put_batch([*others, A], torch.zeros(4, 3, 5))
    assert order(cache) == others


# Pins


def test_a_pinned_tile_stays():
    cache = cache_of(A, B, C)
    cache.pin(A)
    cache.pin(A)
    cache.put(D, tile(4))
    cache.unpin(A)
    cache.put(B, tile(5))
    assert order(cache) == [A, D, B]
    cache.unpin(A)
    cache.put(C, tile(6))
    assert order(cache) == [D, B, C]
    with pytest.raises(ValueError, match=r"key to unpin must be pinned, got .*tile=0.*which is not"):
        cache.unpin(A)
    with pytest.raises(KeyError, match="tile=0.*is not in the cache"):
        cache.pin(A)


def test_nothing_to_evict_is_out_of_pages_and_changes_nothing():
    cache = cache_of(A, B, (1, 0, 0, "k"))
    cache.pin(A)
    with cache.pinned((1, 0, 0, "k")):
        before = state(cache)
        with pytest.raises(OutOfPagesError, match="allocate 2 pages: 0 free, 1 evictable, 2 pinned by 2 sequences"):
            cache.put_batch([C, D], torch.zeros(2, 3, 5))
        assert state(cache) == before
        cache.put(C, tile(4))
    assert order(cache) == [A, (1, 0, 0, "k"), C]


def test_a_key_is_put_anew_when_all_others_are_pinned():
    cache = cache_of(A, B, C)
    for key in (A, B, C):
        cache.pin(key)
    cache.put(B, tile(8))
    cache.put_batch([A, C], torch.stack([tile(7), tile(9)]))
    assert cache.get_batch([A, B, C]).amax(dim=(1, 2)).tolist() == [7, 8, 9]
    assert cache.stats().num_pinned == 3


def test_pins_stay_with_their_key():
    cache = cache_of(A, B, C)
    cache.pin(A)
    assert cache.remove(A)
    assert cache.stats().num_pinned == 0
    cache.put(A, tile(4))
    cache.put_batch([B, C], torch.zeros(2, 3, 5))
    cache.put(D, tile(5))
    assert order(cache) == [A, C, D]
    cache.remove(A)
    cache.unpin(A)
    cache.put_batch([A, B], torch.zeros(2, 3, 5))
    cache.put(C, tile(6))
    assert A in cache
    assert cache.stats().num_pinned == 0


@pytest.mark.parametrize("change", ["put", "put_batch", "remove", "remove_sequence", "clear", "reorder"])
def test_a_pinned_view_stays_as_it_is(change):
    cache = cache_of(A, B, C, capacity=4)
    with cache.pinned(A) as view, cache.pinned(A) as second:
        {**CHANGES, "reorder": lambda cache: cache.reorder({0: 7})}[change](cache)
        for index in range(6):
            cache.put((3, 0, index, "k"), tile(10 + index))
        assert torch.equal(view, tile(1))
        assert view.data_ptr() == second.data_ptr()
        assert cache.stats().num_pinned == 1
    assert cache.stats().num_pinned == 0
    assert len(cache._slots.free) + cache.stats().num_tiles == 4


def test_a_view_of_a_tile_that_is_not_there():
    with pytest.raises(KeyError, match="is not in the cache"), cache_of(A).pinned(B):
        pass


# Removing and sharing


def test_remove_frees_room():
    cache = cache_of(A, B, (1, 0, 0, "v"))
    assert cache.remove(A)
    assert not cache.remove(A)
    assert cache.stats().num_free == 1
    assert cache.remove_sequence(0) == 1
    assert cache.remove_sequence(0) == 0
    assert order(cache) == [(1, 0, 0, "v")]
    cache.clear()
    assert len(cache) == 0
    assert cache.stats().num_free == cache.capacity == 3


def test_a_fork_shares_tiles_until_one_is_put():
    cache = cache_of(A, B)
    cache.fork(0, 4)
    stats = cache.stats()
    assert (stats.num_tiles, stats.num_keys) == (2, 4)
    forked = (4, 0, 0, "k")
    assert order(cache) == [A, B, forked, (4, 0, 1, "k")]
    cache.put(forked, tile(9))
    assert torch.equal(cache.get(A), tile(1))
    assert torch.equal(cache.get(forked), tile(9))
    assert cache.stats().num_tiles == 3
    with pytest.raises(ValueError, match="dst must be a sequence without tiles, got 0, which has 2"):
        cache.fork(4, 0)
    cache.fork(17, 18)
    assert cache.remove_sequence(4) == 2
    assert cache.stats().num_free == 1


def test_a_shared_tile_can_be_put_in_a_full_cache():
    """The other name is evicted, so that the slot is the first one's alone."""
    cache = cache_of(A, capacity=1)
    cache.fork(0, 1)
    cache.put(A, tile(2))
    assert order(cache) == [A]
    assert torch.equal(cache.get(A), tile(2))
    assert cache.stats().evictions == 1


def test_evicting_drops_names_from_the_oldest_on_until_a_slot_is_free():
    cache = cache_of(A, B, capacity=2)
    cache.fork(0, 1)
    cache.put((2, 0, 0, "k"), tile(3))
    assert order(cache) == [(1, 0, 1, "k"), (2, 0, 0, "k")]
    assert cache.stats().evictions == 3


def test_reorder_is_all_at_once():
    cache = HostTileCache(4, 3, 5)
    for sequence in range(4):
        cache.put((sequence, 0, 0, "k"), tile(sequence))
    cache.reorder([1, 0, 0])
    assert [cache.get((sequence, 0, 0, "k"))[0, 0].item() for sequence in range(4)] == [1, 0, 0, 3]
    assert cache.stats().num_free == 1
    cache.reorder({0: 3, 2: 9, 3: 3})
    assert [(sequence, 0, 0, "k") in cache for sequence in range(4)] == [True, True, False, True]
    assert cache.get((0, 0, 0, "k"))[0, 0] == 3
    cache.reorder([])
    assert cache.stats().num_tiles == 2


# Files


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_loaded_cache_is_the_saved_one(tmp_path, dtype):
    cache = HostTileCache(5, 3, 5, dtype=dtype)
    cache.put_batch([A, B, (1, 2, 3, "v")], torch.randn(3, 3, 5).to(torch.float32 if dtype == torch.int8 else dtype))
    cache.fork(0, 6)
    cache.get(A)
    cache.save(tmp_path / "tiles")
    loaded = HostTileCache(3, 3, 5, dtype=dtype)
    loaded.put(D, torch.zeros(3, 5).to(torch.float32 if dtype == torch.int8 else dtype))
    loaded.load(tmp_path / "tiles")
    assert order(loaded) == order(cache)
    assert loaded.stats().num_tiles == 3
    for key in order(cache):
        for read, saved in zip(loaded.get(key), cache.get(key), strict=True):
            assert torch.equal(read, saved)
    HostTileCache(1, 3, 5, dtype=dtype).save(tmp_path / "tiles")
    loaded.load(tmp_path / "tiles")
    assert len(loaded) == 0


def test_a_load_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "tiles"
    cache = cache_of(A, B)
    cache.save(path)
    before = state(cache)
    cache.pin(A)
    with pytest.raises(ValueError, match="must have nothing pinned"):
        cache.load(path)
    cache.unpin(A)
    with cache.pinned(A):
        cache.remove(A)
        with pytest.raises(ValueError, match="must have nothing pinned"):
            cache.load(path)
    cache = cache_of(A, B)
    small = cache_of(C, capacity=1)
    with pytest.raises(ValueError, match="capacity"):
        small.load(path)
    assert order(small) == [C]
    other = HostTileCache(3, 3, 5, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype"):
        other.load(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptPageError):
        cache.load(path)
    assert state(cache) == before


# Refusals


@pytest.mark.parametrize(
    "key, error, words",
    [
        ([0, 0, 0, "k"], TypeError, "a tile key must be a tuple"),
        ((0, 0, "k"), TypeError, "a tile key must be a tuple"),
        ((0, 0, 0, "q"), ValueError, "part of a tile must be 'k' or 'v', got 'q'"),
        ((0, True, 0, "k"), TypeError, "head of a tile key must be an int, got bool"),
        ((0, 0, 7.0, "k"), TypeError, "tile of a tile key must be an int, got float"),
        ((-1, 0, 0, "k"), ValueError, "sequence of a tile key must be from 0"),
        ((2**31, 0, 0, "k"), ValueError, "sequence of a tile key must be from 0"),
    ],
)
def test_bad_keys_are_refused_everywhere(key, error, words):
    cache = cache_of(A)
    before = state(cache)
    calls = [
        lambda: cache.put(key, tile(0)),
        lambda: cache.put_batch([B, key], torch.zeros(2, 3, 5)),
        lambda: cache.get(key),
        lambda: cache.get_batch([A, key]),
        lambda: cache.contains(key),
        lambda: cache.remove(key),
        lambda: cache.pin(key),
        lambda: cache.unpin(key),
        lambda: cache.pinned(key).__enter__(),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()
    assert state(cache) == before


def test_a_missing_tile_of_a_batch_is_named_and_nothing_is_touched():
    cache = cache_of(A, B)
    before, out = state(cache), torch.zeros(3, 3, 5)
    with pytest.raises(KeyError, match=r"TileKey\(sequence=0, head=0, tile=2, part='k'\) is not in the cache"):
        cache.get_batch([A, C, B], out=out)
    assert state(cache) == before
    assert not out.any()
    assert not cache._turns.reads


REFUSED_TILES = {
    "shape": (torch.zeros(3, 4), None, ValueError, r"tile must have shape .* head_dim = 5 \(set by the cache\), got"),
    "dims": (torch.zeros(1, 3, 5), None, ValueError, "tile must have shape"),
    "dtype": (torch.zeros(3, 5).half(), None, TypeError, "tile must have dtype float32, got float16"),
    "no tensor": ([[0.0]], None, TypeError, "tile must be a torch.Tensor, got list"),
    "gradient": (torch.zeros(3, 5, requires_grad=True), None, ValueError, "tile must not require a gradient"),
    "device": (torch.zeros(3, 5, device="meta"), None, ValueError, "tile must be on cpu like the cache, got meta"),
    "scales": (torch.zeros(3, 5), torch.ones(3), ValueError, "scales must be None for float32 tiles"),
}
REFUSED_INT8 = {
    "no scales": (torch.zeros(3, 5).char(), None, TypeError, "Pass scales to store codes as they are"),
    "float": (torch.zeros(3, 5), torch.ones(3), TypeError, "Without scales it is quantised"),
    "shape": (torch.zeros(3, 5).char(), torch.ones(2), ValueError, "scales must have shape"),
    "dtype": (torch.zeros(3, 5).char(), torch.ones(3).half(), TypeError, "scales must have dtype float32, got float16"),
}


@pytest.mark.parametrize("dtype, case", [
    *((torch.float32, case) for case in REFUSED_TILES.values()),
    *((torch.int8, case) for case in REFUSED_INT8.values()),
])  # fmt: skip
def test_bad_tiles_are_refused(dtype, case):
    content, scales, error, words = case
    cache = HostTileCache(2, 3, 5, dtype=dtype)
    with pytest.raises(error, match=words):
        cache.put(A, content, scales)
    batch = content[None] if isinstance(content, torch.Tensor) else content
    with pytest.raises(error, match=words.replace("tile must", "tiles must")):
        cache.put_batch([A], batch, None if scales is None else scales[None])
    assert len(cache) == 0


def test_as_many_tiles_as_keys():
    with pytest.raises(ValueError, match=r"tiles must have shape .*n = 2 \(set by keys\)"):
        cache_of().put_batch([A, B], torch.zeros(3, 3, 5))


@pytest.mark.parametrize(
    "out, error, words",
    [
        (torch.zeros(2, 3, 5), ValueError, r"out must have shape .*n = 1 \(set by keys\)"),
        (torch.zeros(1, 3, 5).half(), TypeError, "out must have dtype float32"),
        (torch.zeros(1, 1, 5).expand(1, 3, 5), ValueError, "out must not be expanded"),
        (torch.zeros(1, 3, 5, requires_grad=True), ValueError, "out must not require a gradient"),
        (torch.zeros(1, 3, 5, device="meta"), ValueError, "out must be on cpu"),
        ([], TypeError, "out must be a torch.Tensor, got list"),
    ],
)
def test_bad_outs_are_refused(out, error, words):
    cache = cache_of(A)
    before = state(cache)
    with pytest.raises(error, match=words):
        cache.get_batch([A], out=out)
    assert state(cache) == before


def test_bad_outs_of_int8_are_refused():
    cache = HostTileCache(1, 3, 5, dtype=torch.int8)
    cache.put(A, tile(1))
    codes = torch.zeros(1, 3, 5, dtype=torch.int8)
    with pytest.raises(TypeError, match="out must be a QuantizedKV"):
        cache.get_batch([A], out=codes)
    with pytest.raises(ValueError, match="out.scales must have shape"):
        cache.get_batch([A], out=QuantizedKV(codes, torch.zeros(1, 4)))


@pytest.mark.parametrize(
    "arguments, options, error, words",
    [
        ((0, 3, 5), {}, ValueError, "capacity must be at least 1, got 0"),
        ((1, 0, 5), {}, ValueError, "tile_size must be at least 1"),
        ((1, 3, 5.0), {}, TypeError, "head_dim must be an int"),
        ((1, 3, 5), {"dtype": torch.float64}, ValueError, "dtype of tiles must be"),
        ((1, 3, 5), {"on_evict": 3}, TypeError, "on_evict must be callable or None, got int"),
    ],
)
def test_caches_that_cannot_be(arguments, options, error, words):
    with pytest.raises(error, match=words):
        HostTileCache(*arguments, **options)


def test_bad_sequences_are_refused():
    cache = cache_of(A)
    for call in (
        lambda: cache.fork(0, -1),
        lambda: cache.fork(-1, 2),
        lambda: cache.remove_sequence(-1),
        lambda: cache.reorder([0, -1]),
        lambda: cache.reorder({-1: 0}),
    ):
        with pytest.raises(ValueError, match="must be at least 0, got -1"):
            call()
    with pytest.raises(ValueError, match="dst must be at most 2147483647"):
        cache.fork(0, 2**31)
    assert order(cache) == [A]


# A model: tiles are lists of one number, so two names share a tile when they are the same list


KEYS = list(itertools.product(range(3), range(1), range(2), "kv"))
keys_of_model = st.sampled_from(KEYS)


class HostCacheMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 6))
    def start(self, capacity):
        self.evicted, self.fails = [], False
        self.cache = HostTileCache(capacity, 1, 2, on_evict=self.on_evict)
        self.capacity, self.tiles, self.pins, self.views = capacity, {}, {}, []
        self.hits = self.misses = self.evictions = 0
        self.counter = 0

    def on_evict(self, key, evicted):
        if self.fails and self.evicted:
            raise OSError("no room")
        self.evicted.append((tuple(key), evicted[0, 0].item()))

    def touch(self, key):
        self.tiles[key] = self.tiles.pop(key)

    def is_viewed(self, tile):
        return any(viewed is tile for *_, viewed in self.views)

    def is_pinned(self, tile, without=()):
        return self.is_viewed(tile) or any(
            self.pins.get(key) and key not in without and other is tile for key, other in self.tiles.items()
        )

    def room(self, tiles, keys):
        """Slots that a put of `keys` finds, when `tiles` are there."""
        kept = {id(tile): tile for key, tile in tiles.items() if key not in keys}
        kept |= {id(tile): tile for *_, tile in self.views}
        return self.capacity - len(kept)

    def victims(self, keys):
        left, victims = dict(self.tiles), []
        for key, tile in self.tiles.items():
            if self.room(left, keys) >= len(keys):
                break
            if key not in keys and not self.is_pinned(tile, without=keys):
                victims.append((key, tile[0]))
                del left[key]
        return victims if self.room(left, keys) >= len(keys) else None

    @rule(keys=st.lists(keys_of_model, min_size=1, max_size=4), fails=st.booleans(), single=st.booleans())
    def put(self, keys, fails, single):
        keys = keys[:1] if single else keys
        values = [float(self.counter + row) for row in range(len(keys))]
        self.counter += len(keys)
        tiles = torch.tensor(values)[:, None, None].expand(-1, 1, 2)
        self.evicted, self.fails = [], fails

        def call():
            if single:
                self.cache.put(keys[0], tiles[0])
            else:
                self.cache.put_batch(keys, tiles)

        distinct = dict.fromkeys(reversed(keys))
        if len(distinct) > self.capacity:
            with pytest.raises(ValueError, match="the capacity"):
                call()
            return
        victims = self.victims(distinct)
        if victims is None:
            with pytest.raises(OutOfPagesError):
                call()
            assert not self.evicted
        elif fails and len(victims) > 1:
            with pytest.raises(OSError, match="no room"):
                call()
        else:
            call()
            assert self.evicted == victims
            self.evictions += len(victims)
            for key, _ in victims:
                del self.tiles[key]
            for key, value in zip(keys, values, strict=True):
                self.tiles.pop(key, None)
                self.tiles[key] = [value]

    @rule(key=keys_of_model)
    def get(self, key):
        read = self.cache.get(key)
        if key in self.tiles:
            assert read.tolist() == [[*self.tiles[key] * 2]]
            self.touch(key)
            self.hits += 1
        else:
            assert read is None
            self.misses += 1

    @rule(keys=st.lists(keys_of_model, max_size=4))
    def get_batch(self, keys):
        if not set(keys) <= set(self.tiles):
            with pytest.raises(KeyError, match="is not in the cache"):
                self.cache.get_batch(keys)
            return
        assert self.cache.get_batch(keys)[:, 0, 0].tolist() == [self.tiles[key][0] for key in keys]
        self.hits += len(keys)
        for key in keys:
            self.touch(key)

    @rule(key=keys_of_model)
    def remove(self, key):
        assert self.cache.remove(key) == (self.tiles.pop(key, None) is not None)

    @rule(sequence=st.integers(0, 2))
    def remove_sequence(self, sequence):
        keys = [key for key in self.tiles if key[0] == sequence]
        assert self.cache.remove_sequence(sequence) == len(keys)
        for key in keys:
            del self.tiles[key]

    @rule()
    def clear(self):
        self.cache.clear()
        self.tiles.clear()

    @rule(key=keys_of_model)
    def pin(self, key):
        if key in self.tiles:
            self.cache.pin(key)
            self.pins[key] = self.pins.get(key, 0) + 1

    @rule(key=keys_of_model)
    def unpin(self, key):
        if self.pins.get(key):
            self.cache.unpin(key)
            self.pins[key] -= 1
        else:
            with pytest.raises(ValueError, match="must be pinned"):
                self.cache.unpin(key)

    @rule(key=keys_of_model)
    def start_view(self, key):
        if key in self.tiles:
            manager = self.cache.pinned(key)
            self.views.append((manager, manager.__enter__(), self.tiles[key]))
            self.touch(key)
            self.hits += 1

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def end_view(self, data):
        manager, *_ = self.views.pop(data.draw(st.integers(0, len(self.views) - 1)))
        manager.__exit__(None, None, None)

    @rule(src=st.integers(0, 2), dst=st.integers(0, 2))
    def fork(self, src, dst):
        if src == dst:
            with pytest.raises(ValueError, match="dst must be another sequence than src"):
                self.cache.fork(src, dst)
            return
        if any(key[0] == dst for key in self.tiles):
            with pytest.raises(ValueError, match="must be a sequence without tiles"):
                self.cache.fork(src, dst)
            return
        self.cache.fork(src, dst)
        self.inherit({dst: src})

    @rule(parents=st.dictionaries(st.integers(0, 2), st.integers(0, 2)))
    def reorder(self, parents):
        self.cache.reorder(parents)
        self.inherit({child: parent for child, parent in parents.items() if child != parent})

    def inherit(self, parents):
        old = dict(self.tiles)
        self.tiles = {key: tile for key, tile in old.items() if key[0] not in parents}
        # In which order siblings of one parent follow is the cache's own business; it is taken over here.
        new = [key for key in order(self.cache) if key not in self.tiles]
        given = {(child, *key[1:]): old[key] for child, parent in parents.items() for key in old if key[0] == parent}
        assert set(new) == set(given)
        self.tiles |= {key: given[key] for key in new}

    @invariant()
    def holds_what_the_model_holds(self):
        assert order(self.cache) == list(self.tiles)
        slots = self.cache._slots
        for key, tile in self.tiles.items():
            assert self.cache._tiles.view(slots.by_key[key])[0].tolist() == tile * 2
        for _, view, tile in self.views:
            assert view[0].tolist() == tile * 2

    @invariant()
    def counts_are_those_of_the_model(self):
        distinct = {id(tile): tile for tile in self.tiles.values()}
        in_use = distinct | {id(tile): tile for *_, tile in self.views}
        pinned = [tile for tile in in_use.values() if self.is_pinned(tile)]
        assert self.cache.stats() == (
            self.capacity,
            len(distinct),
            len(self.tiles),
            len(pinned),
            self.capacity - len(in_use),
            self.hits,
            self.misses,
            self.evictions,
        )
        free = list(self.cache._slots.free)
        assert len(set(free)) == len(free)
        assert not set(free) & set(self.cache._slots.by_key.values())

    def teardown(self):
        for manager, *_ in getattr(self, "views", ()):
            manager.__exit__(None, None, None)


def test_random_programs_agree_with_the_model():
    options = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
    run_state_machine_as_test(HostCacheMachine, settings=options)


def test_the_model_notices_a_slot_that_is_freed_under_its_view(monkeypatch):
    def free_unnamed(self, slots):
        self.free.extend(slot for slot in dict.fromkeys(slots.tolist()) if not self.num_names[slot])

    monkeypatch.setattr(HostSlots, "_free_unused", free_unnamed)
    options = settings(max_examples=500, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(HostCacheMachine, settings=options)
