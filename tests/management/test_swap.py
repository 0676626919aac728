import pytest
import torch

from pagedkv import KVCacheManager, KVCacheSpec, KVPool, OutOfPagesError, TierError
from pagedkv.storage.host import HostPageStore


def make_world(num_pages=8, num_host_pages=8, dtype=torch.float32, order="layer_first", **options):
    spec = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=8, page_size=4, dtype=dtype, order=order)
    pool = KVPool(spec, num_pages)
    store = HostPageStore(pool, num_host_pages)
    return pool, store, KVCacheManager(pool, tier=store, debug=True, **options)


def written(manager, pool, tokens):
    """A sequence of `tokens`, and what its slots hold."""
    seq = manager.open(tokens)
    slots = seq.append(len(tokens) - seq.num_tokens)
    for layer in range(2):
        pool.store(layer, *torch.randn(2, len(slots), 2, 8), slots)
    seq.commit(tokens)
    return seq, content(manager, pool, seq)


def content(manager, pool, seq):
    table = manager.page_table([seq])
    slots = table.slot_mapping(torch.tensor([0, seq.num_tokens], dtype=torch.int32))
    return torch.cat([part for layer in range(2) for part in pool.gather(layer, slots)])


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("prefix_cache", [True, False, "hashed"])
def test_what_comes_back_is_what_went_out(order, dtype, prefix_cache):
    pool, store, manager = make_world(dtype=dtype, order=order, prefix_cache=prefix_cache)
    seq, expected = written(manager, pool, range(10))
    ids = seq.token_ids
    manager.swap_out(seq)
    assert (seq.state, seq.page_ids, seq.num_tokens, seq.token_ids) == ("swapped out", (), 10, ids)
    assert (store.num_free_pages, manager.stats().num_away) == (5, 1)
    # Somebody else takes every page and writes over it.
    other, _ = written(manager, pool, range(100, 132))
    other.close()
    manager.evict()
    assert manager.swap_in(seq).tolist() == []
    assert (seq.state, seq.num_tokens, store.num_free_pages) == ("on pages", 10, 8)
    assert torch.equal(content(manager, pool, seq), expected)
    seq.append(1)
    seq.commit([77])
    if prefix_cache:
        assert manager.open(range(8)).num_cached_tokens == 8


def test_pages_that_are_still_cached_are_not_loaded():
    pool, _, manager = make_world()
    seq, expected = written(manager, pool, range(10))
    pages = seq.page_ids
    manager.swap_out(seq)
    assert manager.num_evictable_pages == 2
    manager.swap_in(seq)
    assert seq.page_ids[:2] == pages[:2]
    assert torch.equal(content(manager, pool, seq), expected)


def test_a_store_without_room_changes_nothing():
    pool, store, manager = make_world(num_host_pages=2)
    seq, expected = written(manager, pool, range(10))
    with pytest.raises(TierError, match="host store must have room for 3 pages, got 2 free of 2. Drop the sequence"):
        manager.swap_out(seq)
    assert (seq.state, store.num_free_pages) == ("on pages", 2)
    assert torch.equal(content(manager, pool, seq), expected)


def test_a_pool_without_room_keeps_what_was_saved():
    pool, store, manager = make_world(num_pages=4)
    seq, expected = written(manager, pool, range(10))
    manager.swap_out(seq)
    other, _ = written(manager, pool, range(100, 112))
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 0 free"):
        manager.swap_in(seq)
    assert (seq.state, store.num_free_pages) == ("swapped out", 5)
    other.close()
    manager.swap_in(seq)
    assert torch.equal(content(manager, pool, seq), expected)


def test_a_tier_that_fails_to_load_keeps_the_sequence_away():
    pool, store, manager = make_world()
    seq, expected = written(manager, pool, range(10))
    manager.swap_out(seq)
    load = store.load

    def fail(ticket, pages):
        raise TierError("broken")

    store.load = fail
    with pytest.raises(TierError, match="broken"):
        manager.swap_in(seq)
    assert (seq.state, seq.lock_handle) == ("swapped out", None)
    store.load = load
    manager.swap_in(seq)
    assert torch.equal(content(manager, pool, seq), expected)


def test_close_of_a_swapped_sequence_drops_what_was_saved():
    pool, store, manager = make_world()
    seq, _ = written(manager, pool, range(10))
    manager.swap_out(seq)
    seq.close()
    assert (store.num_free_pages, seq.is_closed, manager.stats().num_sequences) == (8, True, 0)


def test_dropped_tokens_are_given_back_to_be_computed_again():
    pool, _, manager = make_world()
    seq, _ = written(manager, pool, range(10))
    seq.append(3)
    manager.drop(seq)
    assert (seq.state, seq.page_ids, seq.num_tokens, seq.token_ids) == ("dropped", (), 10, tuple(range(10)))
    assert manager.evict(1) == 1
    missing = manager.swap_in(seq)
    assert (seq.num_tokens, seq.num_cached_tokens, missing.tolist()) == (4, 4, [4, 5, 6, 7, 8, 9])
    seq.append(6)
    seq.commit(missing)
    assert seq.token_ids == tuple(range(10))


def test_calls_in_the_wrong_state_are_refused():
    pool, _, manager = make_world()
    seq, _ = written(manager, pool, range(6))
    with pytest.raises(
        ValueError, match="seq must be swapped out or dropped to be swapped in, got one that is on pages"
    ):
        manager.swap_in(seq)
    manager.swap_out(seq)
    for call in (lambda: seq.append(1), lambda: seq.commit([1]), seq.fork, lambda: seq.truncate(0)):
        with pytest.raises(
            ValueError, match="must be on pages for .*, got one that is swapped out. Call KVCacheManager"
        ):
            call()
    with pytest.raises(ValueError, match="must be on pages for swap_out, got one that is swapped out"):
        manager.swap_out(seq)
    seq.close()
    with pytest.raises(ValueError, match="must be swapped out or dropped to be swapped in, got one that is closed"):
        manager.swap_in(seq)


def test_a_tier_is_needed():
    manager = KVCacheManager(4, page_size=4)
    with pytest.raises(ValueError, match="tier must be given here or to the manager, got None"):
        manager.swap_out(manager.open([]))


def test_copies_come_first_without_a_pool():
    manager = KVCacheManager(4, page_size=4, debug=True)
    seq = manager.open([])
    seq.append(1)
    child = seq.fork()
    child.append(1)
    with pytest.raises(ValueError, match="must have its copies made to be swapped out, got one that waits"):
        manager.swap_out(child, object())
