import copy
import pickle
import sys
import threading
from contextlib import nullcontext, suppress

import pytest
import torch

from pagedkv import IntegrityError, OutOfPagesError, quantize_kv
from pagedkv.kernels.quantize import QuantizedKV
from pagedkv.storage.tiles import tile_use
from pagedkv.storage.tiles.tile_cache import TileCache
from pagedkv.storage.tiles.tile_pins import Held
from pagedkv.testing.bits import same_bits, storage_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


def make_cache(num_pages=6, tile_size=4, head_dim=5, **options):
    options = {"num_beams": 2, "num_heads": 2, "num_tiles": 8, "value_dim": 3, **options}
    return TileCache(num_pages, tile_size, head_dim, **options)


def make_tokens(cache, num_rows, num_tokens):
    """Keys and values for `store`, float32 for int8."""
    dtype = torch.float32 if cache.geometry.has_scales else cache.geometry.dtype
    shape = num_rows, cache.num_heads, num_tokens
    key = torch.randn(*shape, cache.geometry.head_dim)
    return key.to(dtype), torch.randn(*shape, cache.geometry.value_dim).to(dtype)


def as_stored(cache, tokens):
    """What the cache must hold of [n, D] tokens: themselves, or codes and scales."""
    if not cache.geometry.has_scales:
        return tokens
    values, scales = quantize_kv(tokens[:, None], torch.int8)
    return QuantizedKV(values[:, 0], scales[:, 0])


def same_tile(a, b):
    if isinstance(a, QuantizedKV):
        return same_bits(a.values, b.values) and same_bits(a.scales, b.scales)
    return same_bits(a, b)


def cut(tile, part):
    return QuantizedKV(tile.values[part], tile.scales[part]) if isinstance(tile, QuantizedKV) else tile[part]


def everything(cache):
    """All that a call that fails must leave alone."""
    buffers = [b for b in (cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales) if b is not None]
    use = cache._ledger.use.last_used.tolist()
    return cache.table.host.tolist(), cache.stats(), storage_bytes(*buffers).tolist(), use, list(cache._ledger.free)


def fill(cache, num_tiles, beam=0, head=0):
    return [cache.register_tile(beam, head, tile) for tile in range(num_tiles)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_properties(dtype):
    cache = make_cache(dtype=dtype)
    assert cache.key_pages.shape == (6, 4, 5)
    assert cache.value_pages.shape == (6, 4, 3)
    assert cache.key_pages.dtype == cache.value_pages.dtype == dtype
    if dtype == torch.int8:
        assert cache.key_scales.shape == cache.value_scales.shape == (6, 1, 4)
        assert cache.key_scales.dtype == cache.value_scales.dtype == torch.float32
    else:
        assert cache.key_scales is cache.value_scales is None
    assert (cache.num_pages, cache.capacity, cache.num_beams, cache.num_heads, cache.num_tiles) == (6, 6, 2, 2, 8)
    assert cache.device == torch.device("cpu")
    assert cache.geometry.value_dim == 3
    assert TileCache(1, 1, 7, num_beams=1, num_heads=1, num_tiles=1).geometry.value_dim == 7
    assert len(cache) == 0
    assert "num_used=0" in repr(cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first, num", [(0, 1), (0, 4), (0, 5), (3, 1), (3, 2), (2, 9), (4, 4), (1, 15)])
def test_store_across_tile_borders_writes_its_tokens_alone(dtype, first, num):
    cache = make_cache(num_pages=16, dtype=dtype)
    key, value = make_tokens(cache, 1, num)
    cache.store(key, value, torch.tensor([first]), torch.tensor([1]))
    cache.check()
    tiles = range(first // 4, (first + num - 1) // 4 + 1)
    assert len(cache) == 2 * len(tiles)
    for head in range(2):
        for part, tokens in (("k", key), ("v", value)):
            whole = [cache.get(1, head, tile, part) for tile in tiles]
            for position in range(4 * tiles.start, 4 * tiles.stop):
                got = cut(whole[position // 4 - tiles.start], slice(position % 4, position % 4 + 1))
                token = position - first
                if 0 <= token < num:
                    assert same_tile(got, as_stored(cache, tokens[0, head, token : token + 1]))
                else:
                    assert same_tile(got, as_stored(cache, torch.zeros_like(tokens[0, head, :1])))
    assert all(cache.get(0, head, tile, "k") is None for head in range(2) for tile in range(8))


def test_store_leaves_other_tokens_and_pages_bitwise():
    cache = make_cache(num_pages=9)
    cache.store(*make_tokens(cache, 2, 6), torch.tensor([0, 0]))
    before = cache.key_pages.clone(), cache.value_pages.clone()
    key, value = make_tokens(cache, 1, 1)
    cache.store(key, value, torch.tensor([6]), torch.tensor([1]))
    for head in range(2):
        page = cache.table.lookup(1, head, 1)
        before[0][page, 2], before[1][page, 2] = key[0, head, 0], value[0, head, 0]
    assert same_bits(cache.key_pages, before[0])
    assert same_bits(cache.value_pages, before[1])
    assert before[0][8].isnan().all()


def test_store_takes_strided_tokens_and_a_subset_of_beams_in_any_order():
    cache = make_cache(num_pages=20, num_beams=3)
    wide = torch.randn(2, 2, 5, 8)
    key, value = wide[..., :5].transpose(1, 1), wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 5:]
    cache.store(key, value, torch.tensor([2, 0]), torch.tensor([2, 0]))
    assert torch.equal(torch.cat([cache.get(2, 1, 0, "k"), cache.get(2, 1, 1, "k")])[2:7], key[0, 1])
    assert torch.equal(torch.cat([cache.get(0, 1, 0, "v"), cache.get(0, 1, 1, "v")])[:5], value[1, 1])
    assert not cache.contains(1, 0, 0)


def test_store_of_nothing_changes_nothing():
    cache = make_cache()
    before = everything(cache)
    cache.store(torch.zeros(2, 2, 0, 5), torch.zeros(2, 2, 0, 3), torch.tensor([0, 32]))
    none = torch.zeros(0, dtype=torch.int64)
    cache.store(torch.zeros(0, 2, 1, 5), torch.zeros(0, 2, 1, 3), none, none)
    assert everything(cache) == before


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"key": torch.zeros(2, 3, 1, 5)},
            ValueError,
            r"key must have shape .*H = 2 \(set by the cache\)",
        ),
        ({"key": torch.zeros(1, 2, 1, 5)}, ValueError, r"R = 2 \(set by the cache\)"),
        ({"value": torch.zeros(2, 2, 1, 5)}, ValueError, r"value must have shape .*Dv = 3 \(set by the cache\)"),
        ({"value": torch.zeros(2, 2, 2, 3)}, ValueError, r"n = 1 \(set by key\)"),
        ({"key": torch.zeros(2, 2, 1, 5).half()}, TypeError, "key must have dtype float32, got float16"),
        ({"value": torch.zeros(2, 2, 1, 3, device="meta")}, ValueError, "value must be on cpu like the cache"),
        ({"key": torch.zeros(2, 2, 1, 10)[..., ::2]}, ValueError, "key must have a contiguous last dimension"),
        ({"key": torch.zeros(2, 2, 1, 5, requires_grad=True)}, ValueError, "key must not require a gradient"),
        (
            {"first_tokens": torch.tensor([0, 32])},
            ValueError,
            "room for 1 tokens among the 32 of a beam, got 32 for row 1",
        ),
        ({"first_tokens": torch.tensor([-1, 0])}, ValueError, "got -1 for row 0"),
        ({"first_tokens": torch.tensor([2**63 - 1, 0])}, ValueError, "got 9223372036854775807 for row 0"),
        ({"first_tokens": torch.tensor([0, 0]).int()}, TypeError, "first_tokens must have dtype int64, got int32"),
        ({"first_tokens": torch.tensor([0])}, ValueError, "first_tokens must have shape"),
        ({"beam_ids": torch.tensor([0, 2])}, ValueError, "beam_ids must be in 0..1, got 2 at entry 1"),
        ({"beam_ids": torch.tensor([-1, 1])}, ValueError, "beam_ids must be in 0..1, got -1 at entry 0"),
        ({"beam_ids": torch.tensor([1, 1])}, ValueError, "beam_ids must name no beam twice"),
        ({"beam_ids": torch.tensor([1, 0]).int()}, TypeError, "beam_ids must have dtype int64, got int32"),
    ],
)
def test_store_refuses_before_anything_changes(changes, error, message):
    cache = make_cache(num_pages=2)
    fill(cache, 2)
    before = everything(cache)
    arguments = {"key": torch.zeros(2, 2, 1, 5), "value": torch.zeros(2, 2, 1, 3), "first_tokens": torch.tensor([4, 4])}
    with pytest.raises(error, match=message):
        cache.store(**{**arguments, **changes})
    assert everything(cache) == before


@pytest.mark.parametrize(
    "index, message",
    [
        ((2, 0, 0), "beam must be in 0..1, got 2"),
        ((0, -1, 0), "head must be in 0..1, got -1"),
        ((0, 2, 0), "head must be in 0..1, got 2"),
        ((0, 0, 8), "tile must be in 0..7, got 8"),
    ],
)
def test_index_outside_is_refused_by_name(index, message):
    cache = make_cache()
    calls = [cache.register_tile, cache.pin, cache.unpin, cache.remove, cache.contains]
    calls += [lambda *index: cache.get(*index, "k"), lambda *index: cache.get_for_write(*index, "v")]
    calls += [lambda *index: cache.writing(*index).__enter__()]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(*index)
    assert len(cache) == 0


def test_other_misuse_is_refused():
    cache = make_cache()
    for call in (cache.get, cache.get_for_write):
        with pytest.raises(ValueError, match="part of a tile must be 'k' or 'v', got 'q'"):
            call(0, 0, 0, "q")
    with pytest.raises(ValueError, match="num_tiles must be in 0..8, got 9"), cache.pinned_pages(None, 9):
        pass
    with pytest.raises(ValueError, match="beam_ids must be in 0..1, got 2"), cache.pinned_pages(torch.tensor([2]), 1):
        pass
    with pytest.raises(ValueError, match="beam must be in 0..1, got 2"):
        cache.remove_beam(2)
    for num_tiles, error, words in (
        (torch.tensor([1, 9]), ValueError, "num_tiles must be in 0..8, got 9 at entry 1"),
        (torch.tensor([1, -1]), ValueError, "num_tiles must be in 0..8, got -1 at entry 1"),
        (torch.tensor([1]), ValueError, r"num_tiles must have shape \[R\] with R = 2"),
        (torch.tensor([1, 1]).int(), TypeError, "num_tiles must have dtype int64, got int32"),
        (None, TypeError, "num_tiles must be an int, got NoneType"),
    ):
        with pytest.raises(error, match=words), cache.pinned_pages(None, num_tiles):
            pass
    with pytest.raises(KeyError, match="must be in the cache"):
        cache.pin(0, 0, 0)
    with pytest.raises(ValueError, match="must be pinned"):
        cache.unpin(0, 0, 0)
    with pytest.raises(TypeError, match="on_evict must be callable, got int"):
        make_cache(on_evict=3)
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        make_cache(num_pages=0)
    with pytest.raises(ValueError, match="value_dim must be at least 1, got 0"):
        make_cache(value_dim=0)
    assert len(cache) == 0


def test_no_page_has_two_owners_after_evictions():
    cache = make_cache(num_pages=3)
    fill(cache, 8)
    fill(cache, 8, beam=1, head=1)
    pages = cache.table.host[cache.table.host >= 0].tolist()
    assert sorted(pages) == [0, 1, 2]
    assert [cache.contains(1, 1, tile) for tile in range(8)] == [False] * 5 + [True] * 3
    assert cache.stats().evictions == 13
    cache.check()


@pytest.mark.parametrize("queue_length", [1, 2, 4096])
def test_evicts_what_was_used_longest_ago(monkeypatch, queue_length):
    monkeypatch.setattr(tile_use, "_QUEUE_LENGTH", queue_length)
    gone = []
    cache = make_cache(num_pages=4, on_evict=lambda beams, head, tile, key, value: gone.append(tile))
    fill(cache, 4)
    cache.get(0, 0, 1, "v")
    cache.register_tile(0, 0, 0)
    cache.contains(0, 0, 2)  # no use
    with cache.pinned_pages(torch.tensor([0]), 1):
        pass
    fill(cache, 8, beam=0, head=1)
    assert gone[:4] == [2, 3, 1, 0]


@pytest.mark.parametrize("queue_length", [1, 4096])
def test_page_that_was_pinned_keeps_its_place_in_the_order(monkeypatch, queue_length):
    monkeypatch.setattr(tile_use, "_QUEUE_LENGTH", queue_length)
    gone = []
    cache = make_cache(num_pages=4, on_evict=lambda beams, head, tile, key, value: gone.append((head, tile)))
    fill(cache, 4)
    cache.pin(0, 0, 0)
    cache.register_tile(0, 1, 0)
    cache.unpin(0, 0, 0)
    cache.register_tile(0, 1, 1)
    assert gone == [(0, 1), (0, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_evict_gets_copies_of_what_goes(dtype):
    gone = []
    cache = make_cache(num_pages=2, dtype=dtype, on_evict=lambda *evicted: gone.append(evicted))
    key, value = make_tokens(cache, 1, 4)
    cache.store(key, value, torch.tensor([0]), torch.tensor([0]))
    cache.fork(0, 1)
    cache.register_tile(0, 0, 5)
    with cache.writing(0, 0, 5) as views:
        for view in views:
            (view.values if isinstance(view, QuantizedKV) else view).zero_()
    [(beams, head, tile, got_key, got_value)] = gone
    assert (beams, head, tile) == ([0, 1], 0, 0)
    assert same_tile(got_key, as_stored(cache, key[0, 0]))
    assert same_tile(got_value, as_stored(cache, value[0, 0]))


def test_on_evict_that_raises_changes_nothing():
    calls = []

    def on_evict(beams, head, tile, key, value):
        calls.append(tile)
        if len(calls) == 2:
            raise OSError("disk full")

    cache = make_cache(num_pages=4, on_evict=on_evict)
    cache.store(*make_tokens(cache, 1, 8), torch.tensor([0]), torch.tensor([0]))
    before = everything(cache)
    key, value = make_tokens(cache, 1, 1)
    with pytest.raises(OSError, match="disk full"):
        cache.store(key, value, torch.tensor([20]), torch.tensor([1]))
    assert calls == [0, 0]
    assert everything(cache) == before
    cache.store(key, value, torch.tensor([20]), torch.tensor([1]))
    assert calls == [0, 0, 0, 0]
    cache.check()


def test_on_evict_may_read_and_must_not_change_the_cache():
    changes = {
        "register_tile": (0, 0, 0), "get_for_write": (0, 0, 0, "k"), "pin": (0, 0, 1), "unpin": (0, 0, 1),
        "remove": (0, 0, 0), "remove_beam": (0,), "clear": (), "fork": (0, 1), "reorder": ([1, 1],),
        "store": (torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 3), torch.tensor([0]), torch.tensor([0])),
    }  # fmt: skip
    refused = []

    def on_evict(beams, head, tile, key, value):
        assert torch.equal(cache.get(0, 0, 1, "k"), torch.ones(4, 5))
        assert cache.stats().num_used == len(cache) == 2
        for name, arguments in changes.items():
            with pytest.raises(RuntimeError, match="must not be changed by its on_evict"):
                getattr(cache, name)(*arguments)
            refused.append(name)
        for block in (cache.pinned_pages(None, 1), cache.writing(0, 0, 0)):
            with pytest.raises(RuntimeError, match="must not be changed by its on_evict"), block:
                pass

    cache = make_cache(num_pages=2, on_evict=on_evict)
    fill(cache, 2)
    cache.get_for_write(0, 0, 1, "k").fill_(1)
    cache.register_tile(1, 1, 1)
    assert refused == list(changes)
    cache.unpin(0, 0, 1)
    cache.check()


def test_full_of_pinned_pages_is_an_answer_and_changes_nothing():
    cache = make_cache(num_pages=3)
    fill(cache, 2)
    cache.register_tile(1, 0, 0)
    for tile in range(2):
        cache.pin(0, 0, tile)
    cache.pin(1, 0, 0)
    before = everything(cache)
    key, value = make_tokens(cache, 1, 1)
    calls = [
        lambda: cache.register_tile(0, 1, 0),
        lambda: cache.get_for_write(0, 1, 0, "k"),
        lambda: cache.writing(0, 1, 0).__enter__(),
        lambda: cache.store(key, value, torch.tensor([4]), torch.tensor([0])),
    ]
    for call in calls:
        with pytest.raises(OutOfPagesError, match="cannot allocate 1 page: 0 free, 0 evictable, 3 pinned by 2 seq"):
            call()
        assert everything(cache) == before
    cache.unpin(1, 0, 0)
    cache.register_tile(0, 1, 0)
    assert not cache.contains(1, 0, 0)


def test_store_never_evicts_what_it_needs():
    cache = make_cache(num_pages=4)
    cache.store(*make_tokens(cache, 1, 8), torch.tensor([0]), torch.tensor([0]))
    before = everything(cache)
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 0 free, 0 evictable, 0 pinned by 0 sequences"):
        cache.store(*make_tokens(cache, 1, 9), torch.tensor([0]), torch.tensor([0]))
    assert everything(cache) == before
    key, value = make_tokens(cache, 1, 2)
    cache.store(key, value, torch.tensor([7]), torch.tensor([0]))  # needs tile 1, so tile 0 goes
    assert [cache.contains(0, 0, tile) for tile in range(3)] == [False, True, True]
    assert torch.equal(cache.get(0, 1, 1, "k")[3], key[0, 1, 0])


def test_get_is_the_callers_own():
    cache = make_cache()
    cache.store(*make_tokens(cache, 2, 4), torch.tensor([0, 0]))
    before = cache.key_pages.clone()
    cache.get(0, 0, 0, "k").zero_()
    assert same_bits(cache.key_pages, before)
    kept = cache.get(0, 0, 0, "v")
    copy = kept.clone()
    with cache.writing(0, 0, 0) as (_, value):
        value.zero_()
    assert same_bits(kept, copy)


def test_get_for_write_writes_the_page_and_pins_it():
    cache = make_cache(num_pages=1, dtype=torch.int8)
    key = cache.get_for_write(1, 0, 3, "k")
    value = cache.get_for_write(1, 0, 3, "v")
    assert (key.values.shape, key.scales.shape, value.values.shape) == ((4, 5), (4,), (4, 3))
    key.values.fill_(3)
    key.scales.fill_(0.5)
    assert (cache.get(1, 0, 3, "k").values == 3).all()
    assert (cache.key_scales == 0.5).all()
    for _ in range(2):
        with pytest.raises(OutOfPagesError, match="1 pinned by 1 sequence"):
            cache.register_tile(0, 0, 0)
        cache.unpin(1, 0, 3)
    assert cache.register_tile(0, 0, 0) == 0
    assert not cache.contains(1, 0, 3)


def test_pinned_page_stays_until_the_last_unpin_though_nobody_names_it():
    cache = make_cache(num_pages=2)
    cache.get_for_write(0, 0, 0, "k").fill_(7)
    page = cache.pin(0, 0, 0)
    assert cache.remove(0, 0, 0)
    assert not cache.remove(0, 0, 0)
    assert (len(cache), cache.stats().num_pinned) == (1, 1)
    assert cache.get(0, 0, 0, "k") is None
    other = cache.register_tile(0, 0, 0)
    cache.register_tile(0, 0, 1)  # evicts the other one
    assert other != page
    assert (cache.key_pages[page] == 7).all()
    cache.check()
    cache.unpin(0, 0, 0)
    assert cache.stats().num_free == 0
    cache.unpin(0, 0, 0)
    assert cache.stats().num_free == 1
    cache.check()


def test_pinned_pages_names_and_holds_pages():
    cache = make_cache(num_pages=4, num_tiles=3)
    cache.store(*make_tokens(cache, 1, 5), torch.tensor([0]), torch.tensor([1]))
    with cache.pinned_pages(torch.tensor([1, 0, 1]), 2) as ids:
        assert ids.dtype == torch.int32
        assert torch.equal(ids, cache.table.host[[1, 0, 1], :, :2])
        assert cache.stats().num_pinned == 4
        assert (cache.stats().hits, cache.stats().misses) == (8, 4)
        with pytest.raises(OutOfPagesError, match="4 pinned by 1 sequence"):
            cache.register_tile(0, 0, 0)
        cache.clear()
        assert len(cache) == 4
        cache.check()
    assert len(cache) == 0
    with cache.pinned_pages(None, 0) as ids:
        assert ids.shape == (2, 2, 0)
    with pytest.raises(KeyError), cache.pinned_pages(None, 3):
        raise KeyError
    assert cache.stats().num_pinned == 0


def test_remove_beam_and_clear():
    cache = make_cache(num_pages=8)
    cache.store(*make_tokens(cache, 2, 5), torch.tensor([0, 0]))
    assert cache.remove_beam(0) == 4
    assert cache.remove_beam(0) == 0
    assert len(cache) == 4
    cache.clear()
    assert len(cache) == 0
    assert (cache.table.device_table == -1).all()
    cache.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load_are_bitwise_and_keep_sharing_and_order(tmp_path, dtype):
    cache = make_cache(num_pages=9, dtype=dtype)
    cache.store(*make_tokens(cache, 1, 9), torch.tensor([0]), torch.tensor([0]))
    cache.fork(0, 1)
    cache.store(*make_tokens(cache, 1, 1), torch.tensor([9]), torch.tensor([1]))
    cache.get(0, 0, 0, "k")
    cache.save(tmp_path / "tiles")
    order = []
    loaded = make_cache(num_pages=8, dtype=dtype, on_evict=lambda *evicted: order.append(evicted[:3]))
    fill(loaded, 3, beam=1, head=1)
    loaded.load(tmp_path / "tiles")
    loaded.check()
    assert len(loaded) == len(cache) == 8
    assert loaded.stats().num_shared == 4
    for beam in range(2):
        for head in range(2):
            for tile in range(8):
                for part in "kv":
                    there = cache.contains(beam, head, tile)
                    assert loaded.contains(beam, head, tile) == there
                    if there:
                        page, other = cache.table.lookup(beam, head, tile), loaded.table.lookup(beam, head, tile)
                        views = (c._buffers.view(p, part) for c, p in ((cache, page), (loaded, other)))
                        assert same_tile(*views)
    fill(loaded, 8)
    assert order == [([0, 1], 1, 0), ([0, 1], 1, 1), ([0], 1, 2), ([1], 0, 2), ([1], 1, 2)]


def test_load_refuses_and_leaves_the_cache_as_it_is(tmp_path):
    path = tmp_path / "tiles"
    cache = make_cache()
    cache.store(*make_tokens(cache, 2, 4), torch.tensor([28, 28]))
    cache.save(path)
    others = [
        (make_cache(num_tiles=7), "tile of a saved tile must be in 0..6, got 7"),
        (make_cache(num_beams=1), "beam of a saved tile must be in 0..0, got 1"),
        (make_cache(num_heads=1), "head of a saved tile must be in 0..0, got 1"),
        (make_cache(num_pages=3), "4"),
        (make_cache(dtype=torch.float16), "float16"),
        (make_cache(tile_size=2), "tile_size"),
    ]
    for other, message in others:
        other.register_tile(0, 0, 0)
        before = everything(other)
        with pytest.raises(ValueError, match=message):
            other.load(path)
        assert everything(other) == before
    cache.pin(0, 0, 7)
    before = everything(cache)
    with pytest.raises(ValueError, match="no page may be pinned while a cache is loaded, got 1"):
        cache.load(path)
    assert everything(cache) == before
    cache.unpin(0, 0, 7)
    cache.load(path)
    cache.check()


def test_save_of_an_empty_cache(tmp_path):
    make_cache().save(tmp_path / "tiles")
    cache = make_cache()
    fill(cache, 3)
    cache.load(tmp_path / "tiles")
    assert len(cache) == 0
    cache.check()


HELD = Held.one(1, 0, writes=False)


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda c: c._ledger.free.append(5), "page 5 is on it more than once"),
        (lambda c: c._ledger.free.append(0), "page 0 is on it and is named or pinned"),
        (lambda c: c._ledger.free.remove(5), "page 5 is neither"),
        (lambda c: c.table.assign(1, 0, 0, 0), "as many names as beams have it in the table: page 0"),
        (lambda c: c.table.assign(0, 0, 0, 6), r"the table has \[6\], outside 0..5"),
        (lambda c: c._ledger.tile_of.__setitem__(0, 3), "page 0 stands in the table under another one"),
        (lambda c: c._ledger.tile_of.__setitem__(4, 3), "page 4 is free and of one"),
        (lambda c: c._ledger.pins.by_tile.update({(0, 0, 1): (HELD,)}), "page 1 has another holder"),
        (lambda c: c._ledger.num_pins.__setitem__(0, 1), "page 0 is pinned|page 0 has another number of pins"),
        (lambda c: c._ledger.num_writers.__setitem__(0, 1), "page 0 has another number of writers"),
        (lambda c: c._ledger.holder.__setitem__(0, 1), "page 0 has a holder and no pin"),
        (lambda c: c._ledger.use.last_used.__setitem__(0, 1), "no two pages were last used at the same time"),
        (lambda c: c._ledger.use.last_used.__setitem__(0, 9), "page 0 was used later than now"),
        (lambda c: c.table.device_table.fill_(-1), "the table on the device is the table on the host"),
    ],
)
def test_check_quotes_the_broken_sentence(damage, sentence):
    cache = make_cache()
    fill(cache, 2)
    cache.check()
    damage(cache)
    with pytest.raises(IntegrityError, match=sentence):
        cache.check()


@pytest.fixture
def eager_threads():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def threads_share_a_cache(cache):
    """One thread stores and reorders, two read; what a tile holds says which one it is. Returns what went wrong."""
    errors, stored, stop = [], [], threading.Event()
    half = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1)  # of the second head

    def write():
        for number in range(500):
            tokens = (half + number).expand(1, 2, 4, 5).contiguous(), (half + number).expand(1, 2, 4, 3).contiguous()
            # Whether enough pages are not pinned just now is up to the readers.
            with suppress(OutOfPagesError):
                cache.store(*tokens, torch.tensor([number % 4 * 4]), torch.tensor([number % 2]))
                stored.append(number)
            if number % 7 == 0:
                cache.reorder([1, 0] if number % 2 else [0, 0])

    def read(head):
        while not stop.is_set():
            for tile in range(4):
                key = cache.get(0, head, tile, "k")
                assert key is None or (key == key[0, 0]).all()
                assert key is None or key[0, 0] % 4 == tile + head / 2
            with cache.pinned_pages(torch.tensor([1]), 1) as ids:
                page = int(ids[0, head, 0])
                assert page < 0 or cache.key_pages[page, 0, 0] % 4 == head / 2

    def run(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    readers = [threading.Thread(target=run, args=(read, head)) for head in range(2)]
    for reader in readers:
        reader.start()
    run(write)
    stop.set()
    for reader in readers:
        reader.join()
    if not errors:
        assert len(stored) > 100
        assert cache.stats().num_pinned == 0
        run(cache.check)
    return errors


def test_threads_read_whole_tiles_while_one_writes_and_evicts(eager_threads):
    assert not threads_share_a_cache(make_cache(num_pages=5, num_tiles=4))


class NoLock(nullcontext):
    def _is_owned(self):
        return False


def test_threads_without_the_lock_are_found(eager_threads):
    """The test above can fail."""
    for _ in range(20):
        cache = make_cache(num_pages=5, num_tiles=4)
        cache._lock = cache.table.lock = NoLock()
        if threads_share_a_cache(cache):
            return
    pytest.fail("20 runs without a lock went well")


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_leaves_no_token_of_a_new_tile_undefined(dtype):
    """After a gap as before the end; but not in a tile that was there."""
    cache = make_cache(num_pages=12, dtype=dtype)
    with cache.writing(0, 0, 1) as (key, value):
        for part in (key, value):
            (part.values if isinstance(part, QuantizedKV) else part).fill_(7)
            if isinstance(part, QuantizedKV):
                part.scales.fill_(1)
    key, value = make_tokens(cache, 2, 6)
    cache.store(key, value, torch.tensor([7, 3]))
    for beam, first in ((0, 7), (1, 3)):
        for head, tile in ((head, tile) for head in range(2) for tile in range(first // 4, (first + 5) // 4 + 1)):
            for offset in range(4):
                token = 4 * tile + offset - first
                for part, tokens in (("k", key), ("v", value)):
                    right = (
                        tokens[beam, head, token : token + 1] if 0 <= token < 6 else torch.zeros_like(tokens[0, 0, :1])
                    )
                    if (beam, head, tile) == (0, 0, 1) and token < 0:
                        continue
                    assert same_tile(
                        cut(cache.get(beam, head, tile, part), slice(offset, offset + 1)), as_stored(cache, right)
                    )
    old = cache.get(0, 0, 1, "k")
    assert ((old.values if isinstance(old, QuantizedKV) else old)[:3] == 7).all()


def test_store_goes_by_the_indices_it_was_called_with():
    first_tokens, beam_ids = torch.tensor([4]), torch.tensor([1])

    def on_evict(*evicted):
        first_tokens.fill_(1000)
        beam_ids.fill_(1000)

    cache = make_cache(num_pages=2, on_evict=on_evict)
    fill(cache, 2)
    cache.store(*make_tokens(cache, 1, 4), first_tokens, beam_ids)
    assert first_tokens.item() == beam_ids.item() == 1000
    assert cache.contains(1, 0, 1)
    assert cache.contains(1, 1, 1)
    cache.check()


def test_pinned_pages_uses_the_tiles_of_each_row_alone():
    gone = []
    cache = make_cache(num_pages=8, on_evict=lambda beams, head, tile, key, value: gone.append((beams[0], head, tile)))
    cache.store(*make_tokens(cache, 2, 8), torch.tensor([0, 0]))
    order = [(beam, head, tile) for beam in range(2) for tile in range(2) for head in range(2)]
    for place in order:
        cache.get(*place, "k")
    before = cache.stats()
    with cache.pinned_pages(torch.tensor([1, 0]), torch.tensor([1, 3])) as ids:
        after = cache.stats()
        assert (after.hits - before.hits, after.misses - before.misses, after.num_pinned) == (6, 2, 6)
        assert torch.equal(ids[0, :, 0], cache.table.host[1, :, 0])
        assert (ids[0, :, 1:] == -1).all()
        assert torch.equal(ids[1], cache.table.host[0, :, :3])
        cache.register_tile(0, 0, 7)
    cache.register_tile(0, 1, 7)
    assert gone == [(1, 0, 1), (1, 1, 1)]
    cache.check()


def test_default_device_and_dtype_change_nothing():
    key, value = torch.randn(1, 2, 6, 5), torch.randn(1, 2, 6, 3)
    index, counts = torch.tensor([1]), torch.tensor([2])
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        for dtype in (torch.float32, torch.int8):
            cache = make_cache(num_pages=12, dtype=dtype)
            cache.store(key, value, index, index)
            cache.fork(1, 0)
            cache.reorder([1, 1])
            cache.store(key, value, index, index - 1)
            with cache.pinned_pages(index, counts) as ids, cache.writing(1, 0, 1):
                assert ids.device.type == "cpu"
            cache.check()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_new_tokens_without_memory_are_refused_before_anything_goes():
    cache = TileCache(1, 4, 2, num_beams=2, num_heads=1, num_tiles=1)
    ones = torch.ones(1, 1, 4, 2)
    cache.store(ones, ones, torch.tensor([0]), torch.tensor([1]))
    freed = torch.ones(1, 1, 4, 2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="value must have memory, got a Tensor of 8 elements without"):
        cache.store(ones, freed, torch.tensor([0]), torch.tensor([0]))
    assert cache.contains(1, 0, 0)
    assert not cache.contains(0, 0, 0)


def test_a_cache_is_not_copied_or_pickled():
    cache = TileCache(1, 4, 2, num_beams=1, num_heads=1, num_tiles=1)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a tile cache must stay where it is"):
            attempt(cache)
