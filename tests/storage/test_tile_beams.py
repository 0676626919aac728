import numpy as np
import pytest
import torch

from pagedkv import OutOfPagesError
from pagedkv.kernels.quantize import QuantizedKV
from pagedkv.storage.tiles.tile_cache import TileCache
from pagedkv.testing.bits import same_bits


def make_cache(num_pages=32, num_beams=4, **options):
    return TileCache(
        num_pages, 4, 5, **{"num_beams": num_beams, "num_heads": 2, "num_tiles": 3, **options}, value_dim=3
    )


def store(cache, beams, first, num):
    """Random tokens at the positions [first, first + num) of beams; returns them."""
    key, value = torch.randn(len(beams), 2, num, 5), torch.randn(len(beams), 2, num, 3)
    cache.store(key, value, torch.full((len(beams),), first), torch.tensor(beams))
    return key, value


def tiles_of(cache, beam):
    """Copies of all tiles of a beam, without using them."""
    tiles = {}
    for head in range(2):
        for tile in range(3):
            page = cache.table.lookup(beam, head, tile)
            if page >= 0:
                buffers = cache.key_pages, cache.value_pages, cache.key_scales, cache.value_scales
                tiles[head, tile] = [pages[page].clone() for pages in buffers if pages is not None]
    return tiles


def same_tiles(a, b):
    return a.keys() == b.keys() and all(same_bits(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_fork_shares_pages_without_copies():
    cache = make_cache()
    store(cache, [2], 0, 6)
    before = tiles_of(cache, 2)
    cache.fork(2, 0)
    cache.check()
    assert torch.equal(cache.table.host[0], cache.table.host[2])
    assert (len(cache), cache.stats().num_shared) == (4, 4)
    assert same_tiles(tiles_of(cache, 0), before)
    cache.remove_beam(2)
    assert (len(cache), cache.stats().num_shared) == (4, 0)
    assert same_tiles(tiles_of(cache, 0), before)
    cache.fork(3, 1)  # of nothing
    assert len(cache) == 4
    cache.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("first, num", [(5, 1), (6, 1), (2, 7), (0, 12), (8, 1)])
def test_store_after_fork_leaves_the_source_bitwise(dtype, first, num):
    cache = make_cache(dtype=dtype)
    store(cache, [1], 0, 6)
    before = tiles_of(cache, 1)
    cache.fork(1, 3)
    store(cache, [3], first, num)
    cache.check()
    assert same_tiles(tiles_of(cache, 1), before)
    after = tiles_of(cache, 3)
    touched = set(range(first // 4, (first + num - 1) // 4 + 1))
    for (head, tile), buffers in before.items():
        assert (cache.table.lookup(3, head, tile) == cache.table.lookup(1, head, tile)) == (tile not in touched)
        for own, old in zip(after[head, tile], buffers, strict=True):
            kept = [offset for offset in range(4) if not first <= 4 * tile + offset < first + num]
            own, old = (tokens.flatten(0, 1) if tokens.shape[0] == 1 else tokens for tokens in (own, old))
            assert same_bits(own[kept], old[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_get_for_write_after_fork_leaves_the_source_bitwise(dtype):
    cache = make_cache(dtype=dtype)
    store(cache, [0], 0, 5)
    before = tiles_of(cache, 0)
    cache.fork(0, 1)
    view = cache.get_for_write(1, 1, 0, "k")
    (view.values if isinstance(view, QuantizedKV) else view)[2] = 7
    assert same_tiles(tiles_of(cache, 0), before)
    after = tiles_of(cache, 1)
    assert (after[1, 0][0][2] == 7).all()
    after[1, 0][0][2] = before[1, 0][0][2]
    assert same_tiles(after, before)
    cache.unpin(1, 1, 0)
    cache.check()


def test_one_of_the_beams_that_all_write_keeps_the_page():
    cache = make_cache(num_pages=2 * 4)
    store(cache, [0], 0, 2)
    cache.reorder([0, 0, 0, 0])
    key, value = store(cache, [3, 1, 0, 2], 2, 1)  # three copies a head fit, four would not
    cache.check()
    assert (len(cache), cache.stats().num_shared, cache.stats().evictions) == (8, 0, 0)
    for row, beam in enumerate([3, 1, 0, 2]):
        for head in range(2):
            assert torch.equal(cache.get(beam, head, 0, "k")[2], key[row, head, 0])
            assert torch.equal(cache.get(beam, head, 0, "v")[2], value[row, head, 0])
            assert torch.equal(cache.get(beam, head, 0, "k")[:2], cache.get(0, head, 0, "k")[:2])


def test_copy_needs_a_page_that_is_not_its_source():
    cache = make_cache(num_pages=2)
    store(cache, [0], 0, 1)
    cache.fork(0, 1)
    before = cache.table.host.clone(), tiles_of(cache, 0)
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 0 free, 0 evictable, 0 pinned by 0 sequences"):
        store(cache, [1], 1, 1)
    cache.pin(0, 1, 0)
    with pytest.raises(OutOfPagesError, match="cannot allocate 1 page: 0 free, 0 evictable, 1 pinned by 2 sequences"):
        cache.get_for_write(1, 0, 0, "k")
    cache.check()
    assert torch.equal(cache.table.host, before[0])
    assert same_tiles(tiles_of(cache, 0), before[1])
    assert same_tiles(tiles_of(cache, 1), before[1])


@pytest.mark.parametrize(
    "parents", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 3, 0], [0, 0, 0, 0], [2, 2, 3, 3], [3, 3, 3, 1]]
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_reorder_gives_every_beam_its_parents_tiles(parents, as_tensor):
    cache = make_cache()
    for beam in range(3):  # beam 3 has none
        store(cache, [beam], 0, 3 * beam + 2)
    before = [tiles_of(cache, beam) for beam in range(4)]
    bits = cache.key_pages.clone(), cache.value_pages.clone()
    cache.reorder(torch.tensor(parents) if as_tensor else parents)
    cache.check()
    for beam, parent in enumerate(parents):
        assert same_tiles(tiles_of(cache, beam), before[parent])
    assert same_bits(cache.key_pages, bits[0])
    assert same_bits(cache.value_pages, bits[1])
    assert len(cache) == sum(len(before[parent]) for parent in set(parents))


def test_reorder_to_itself_uploads_nothing_and_a_swap_the_rows_between():
    cache = make_cache()
    store(cache, range(4), 0, 5)
    cache.table.sync()
    cache.reorder(range(4))
    assert cache.table.sync() == 0
    cache.reorder((0, 2, 1, 3))
    assert cache.table.sync() == 2 * 2 * 3
    cache.check()


def test_decoding_beams_hold_what_each_path_wrote():
    """Twelve steps of a search whose beams are chosen at random, against plain lists of tokens."""
    cache = make_cache(num_pages=4 * 2 * 3)
    paths = [[] for _ in range(4)]
    generator = torch.Generator().manual_seed(5)
    for step in range(12):
        key, _ = store(cache, range(4), step, 1)
        paths = [[*path, key[beam, :, 0]] for beam, path in enumerate(paths)]
        parents = torch.randint(4, (4,), generator=generator)
        cache.reorder(parents)
        paths = [paths[parent] for parent in parents.tolist()]
        cache.check()
        for beam, path in enumerate(paths):
            for position, tokens in enumerate(path):
                got = [cache.get(beam, head, position // 4, "k")[position % 4] for head in range(2)]
                assert torch.equal(torch.stack(got), tokens)
    assert cache.stats().evictions == 0


@pytest.mark.parametrize(
    "parents, error, message",
    [
        ([0, 1, 2], ValueError, r"parents must name one beam for each of 4, got shape \[3\]"),
        ([0, 1, 2, 4], ValueError, r"parents\[3\] must be in 0..3, got 4"),
        ([0, -1, 2, 3], ValueError, r"parents\[1\] must be in 0..3, got -1"),
        ([0, 1.0, 2, 3], TypeError, r"parents\[1\] must be an int, got float"),
        ([0, True, 2, 3], TypeError, r"parents\[1\] must be an int, got bool"),
        (torch.tensor([0, 1, 2, 4]), ValueError, "parents must be in 0..3, got 4 at entry 3"),
        (torch.tensor([0, 1, 2, 3]).int(), TypeError, "parents must have dtype int64, got int32"),
        (torch.zeros(4, 1).long(), ValueError, r"parents must have shape \[B\] with B = 4 .*got \[4, 1\]"),
        (None, TypeError, "parents must be an int64 tensor or ints, one a beam, got NoneType"),
        (3, TypeError, "parents must be an int64 tensor or ints, one a beam, got int"),
        ("0123", TypeError, r"parents\[0\] must be an int, got str"),
        (np.array([0.0, 1.0, 2.0, 3.0]), TypeError, r"parents\[0\] must be an int, got float64"),
        (torch.zeros(4).long().to_sparse(), TypeError, "parents must be a dense tensor"),
    ],
)
def test_reorder_refuses_wrong_parents(parents, error, message):
    cache = make_cache()
    store(cache, [1, 2], 0, 3)
    before = cache.table.host.clone()
    with pytest.raises(error, match=message):
        cache.reorder(parents)
    assert torch.equal(cache.table.host, before)
    cache.check()


def test_fork_refuses_what_would_lose_or_mix_tiles():
    cache = make_cache()
    store(cache, [0, 1], 0, 3)
    before = cache.table.host.clone()
    with pytest.raises(ValueError, match="beam 1 must have no tiles, got 2"):
        cache.fork(0, 1)
    with pytest.raises(ValueError, match="dst must be another beam than src, got 0 for both"):
        cache.fork(0, 0)
    with pytest.raises(ValueError, match="src must be in 0..3, got 4"):
        cache.fork(4, 2)
    with pytest.raises(ValueError, match="dst must be in 0..3, got -1"):
        cache.fork(0, -1)
    assert torch.equal(cache.table.host, before)
    cache.check()


def test_tile_that_is_being_written_is_not_shared():
    cache = make_cache()
    store(cache, [0, 1], 0, 3)
    with cache.writing(0, 1, 0):
        before = cache.table.host.clone()
        # Shared, shared, and one beam's alone still, but another one's.
        for call in (
            lambda: cache.fork(0, 2),
            lambda: cache.reorder([0, 0, 1, 1]),
            lambda: cache.reorder([3, 1, 1, 0]),
        ):
            with pytest.raises(ValueError, match="must not be shared while it is pinned to be written"):
                call()
            assert torch.equal(cache.table.host, before)
        cache.reorder([0, 2, 1, 3])
        cache.check()
    cache.reorder([3, 1, 1, 0])
    cache.fork(3, 0)
    cache.check()


def test_pins_are_on_pages_and_do_not_move_with_beams():
    cache = make_cache()
    store(cache, [0, 1], 0, 3)
    pages = cache.table.host[:, 0, 0].tolist()
    assert cache.pin(0, 0, 0) == pages[0]
    cache.reorder([1, 1, 1, 1])
    cache.check()
    assert (len(cache), cache.stats().num_pinned) == (3, 1)
    assert cache._ledger.num_pins[pages[0]] == 1
    with pytest.raises(ValueError, match=r"tile \(1, 0, 0\) must be pinned"):
        cache.unpin(1, 0, 0)
    cache.unpin(0, 0, 0)
    assert (len(cache), cache.stats().num_pinned) == (2, 0)
    cache.check()


def test_readers_of_a_beam_keep_its_pages_through_a_reorder():
    cache = make_cache(num_pages=6)
    store(cache, [0, 1], 0, 3)
    before = tiles_of(cache, 0)
    with cache.pinned_pages(torch.tensor([0]), 1) as ids:
        cache.reorder([1, 1, 1, 1])
        store(cache, [0], 3, 1)
        with pytest.raises(OutOfPagesError, match="2 pinned by 0 sequences"):
            store(cache, [0, 1, 2], 4, 1)
        for head in range(2):
            assert same_bits(cache.key_pages[int(ids[0, head, 0])], before[head, 0][0])
    store(cache, [0], 4, 1)
    cache.check()


@pytest.mark.parametrize(
    "parents", [(1, 0, 3, 3), range(3, -1, -1), np.array([1, 0, 3, 3]), {2: "b", 0: "a", 1: 0, 3: 0}]
)
@pytest.mark.parametrize("once", [False, True])
def test_reorder_takes_ints_from_anywhere(parents, once):
    cache = make_cache()
    store(cache, range(4), 0, 3)
    before = cache.table.host.clone()
    cache.reorder(iter(parents) if once else parents)
    assert torch.equal(cache.table.host, before[[int(parent) for parent in parents]])
    cache.check()


def hold(cache, beam, with_block):
    """Pins tile 0 of both heads; what undoes it."""
    if with_block:
        block = cache.pinned_pages(torch.tensor([beam]), 1)
        block.__enter__()
        return lambda: block.__exit__(None, None, None)
    for head in range(2):
        cache.pin(beam, head, 0)
    return lambda: [cache.unpin(beam, head, 0) for head in range(2)]


@pytest.mark.parametrize("with_block", [False, True])
@pytest.mark.parametrize("writes", ["store", "get_for_write"])
def test_what_a_reader_of_a_beam_holds_is_not_written_by_another_beam(with_block, writes):
    cache = make_cache()
    store(cache, [0], 0, 4)
    before, pages = tiles_of(cache, 0), cache.table.host[0, :, 0].clone()
    let_go = hold(cache, 0, with_block)
    cache.fork(0, 1)
    cache.remove_beam(0)
    assert cache.stats().num_shared == 0
    for _ in range(2):
        if writes == "store":
            store(cache, [1], 0, 4)
        else:
            for head in range(2):
                cache.get_for_write(1, head, 0, "k").fill_(9)
                cache.unpin(1, head, 0)
    for head in range(2):
        assert same_bits(cache.key_pages[int(pages[head])], before[head, 0][0])
        assert cache.table.lookup(1, head, 0) != pages[head]
    assert len(cache) == 4  # copied once
    cache.check()
    let_go()
    assert len(cache) == 2
    cache.check()


def test_the_beam_that_tiles_are_held_for_goes_on_in_place():
    cache = make_cache()
    store(cache, [0, 1], 0, 2)
    before = cache.table.host.clone()
    with cache.pinned_pages(torch.tensor([0, 0]), 1):
        store(cache, [0], 2, 1)
        assert torch.equal(cache.table.host, before)
        with cache.pinned_pages(torch.tensor([1]), 1):
            store(cache, [0, 1], 3, 1)
        assert torch.equal(cache.table.host, before)


def test_a_page_that_is_held_for_two_beams_is_written_by_neither():
    cache = make_cache(num_pages=6)
    store(cache, [0], 0, 2)
    cache.fork(0, 1)
    before, content = cache.table.host[0, :, 0].clone(), tiles_of(cache, 0)
    with cache.pinned_pages(torch.tensor([0, 1]), 1):
        store(cache, [1, 0], 2, 1)
        for head in range(2):
            assert before[head] not in cache.table.host[:, head, 0]
            assert same_bits(cache.key_pages[int(before[head])], content[head, 0][0])
        assert len(cache) == 6
        cache.check()
    assert len(cache) == 4
    cache.check()


def test_of_beams_that_share_and_write_the_one_that_may_keeps_the_page():
    cache = make_cache()
    store(cache, [2], 0, 2)
    cache.reorder([2, 2, 2, 2])
    page = cache.table.lookup(2, 0, 0)
    cache.pin(2, 0, 0)
    store(cache, range(4), 2, 1)
    assert cache.table.lookup(2, 0, 0) == page
    assert len(cache) == 8
    cache.check()
