"""What a RadixCache tells its log: pages that came, in order of their prefix, and pages that left."""

import random

import pytest

from pagedkv import RadixCache
from pagedkv.management.events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog

pytestmark = pytest.mark.parametrize("core", ["python", pytest.param("native", marks=pytest.mark.native)])


def test_no_log_unless_asked(core):
    assert RadixCache(1, core=core).events is None


def test_every_page_that_comes_and_goes_is_told(core):
    cache = RadixCache(2, events=True, core=core)
    handle = cache.insert([1, 2, 3, 4, 5], [7, 5]).handle
    cache.insert([1, 2, 8, 8], [9, 6])
    cache.lock(handle)
    cache.extend(handle, [5, 6], [4])
    first, branch, longer = cache.events.take()
    assert isinstance(first, BlockStored)
    assert (first.token_ids, first.block_size, first.parent_block_hash) == ((1, 2, 3, 4), 2, None)
    assert (branch.token_ids, branch.parent_block_hash) == ((8, 8), first.block_hashes[0])
    assert (longer.token_ids, longer.parent_block_hash) == ((5, 6), first.block_hashes[1])
    assert cache.evict(9).tolist() == [6]
    cache.unlock(handle)
    assert cache.evict(2).tolist() == [5, 4]
    assert cache.events.take() == [
        BlockRemoved(branch.block_hashes),
        BlockRemoved((first.block_hashes[1], longer.block_hashes[0])),
    ]
    cache.reset()
    assert cache.events.take() == [AllBlocksCleared()]


def test_what_is_not_taken_is_not_told(core):
    cache = RadixCache(1, events=True, core=core)
    cache.insert([1, 2], [0, 1])
    cache.events.take()
    cache.insert([1, 2], [5, 6])
    cache.insert([1, 9], [5, 6], only_new=True)
    cache.match([1, 9])
    cache.evict(0)
    with pytest.raises(ValueError, match="pages must not be in the cache"):
        cache.insert([4], [0])
    assert cache.events.take() == []


def test_a_continuation_is_told_under_its_namespace(core):
    """An extend knows the namespace from the prefix alone."""
    hashes = []
    for namespace in (None, "", ("tenant", 1)):
        cache = RadixCache(1, events=True, core=core)
        cache.insert([3], [9], "other")
        handle = cache.insert([1], [0], namespace).handle
        cache.events.take()
        cache.extend(handle, [2], [1])
        (event,) = cache.events.take()
        assert event.extra_keys == (None if namespace is None else ((namespace,),))
        whole = RadixCache(1, events=True, core=core)
        whole.insert([1, 2], [0, 1], namespace)
        assert event.block_hashes == whole.events.take()[0].block_hashes[1:]
        hashes.append(event.block_hashes)
    assert len(set(hashes)) == 3


def read(events, believed):
    """What a reader does with events, in order, by hash and by the hash before it; refuses what it was not told of."""
    for event in events:
        if isinstance(event, AllBlocksCleared):
            believed.clear()
        elif isinstance(event, BlockStored):
            assert event.parent_block_hash is None or event.parent_block_hash in believed
            assert not believed.keys() & set(event.block_hashes)
            believed.update(zip(event.block_hashes, (event.parent_block_hash, *event.block_hashes), strict=False))
        else:
            for value in event.block_hashes:
                del believed[value]
            assert not set(event.block_hashes) & set(believed.values())


def believed_of(cache):
    """The same of what is cached, from the nodes alone."""
    whole, namespaces, ends, believed = RadixCache(cache.page_size, events=True), {}, {}, {}
    for node in cache.nodes():
        above = node.parent
        namespaces[node] = node.namespace if above is None else namespaces[above]
        ends[node] = [] if above is None else ends[above] + node.tokens.tolist()
        whole.insert(ends[node], [10**6 * len(ends) + number for number in range(len(ends[node]))], namespaces[node])
    read(whole.events.take(), believed)
    return believed


@pytest.mark.parametrize("max_pending", [8, 40, 10**6])
def test_a_reader_has_exactly_what_is_cached_however_seldom_it_comes(core, max_pending):
    num_cleared = 0
    for seed in range(6):
        rng, believed, free = random.Random(seed), {}, list(range(60))
        cache = RadixCache(1, events=True, core=core)
        cache.events = EventLog(max_pending, cache=cache)
        for _ in range(150):
            ids = [rng.randrange(2) for _ in range(min(len(free), rng.randrange(9)))]
            cache.insert(ids, free[: len(ids)], rng.choice([None, "a"]))
            free = [page for page in free if not cache.held_mask(60)[page]]
            if rng.random() < 0.4:
                free += cache.evict(rng.randrange(9)).tolist()
            if rng.random() < 0.02:
                free += cache.reset(force=True).tolist()
            if rng.random() < 0.1:
                events = cache.events.take()
                num_cleared += AllBlocksCleared() in events
                read(events, believed)
                assert believed == believed_of(cache)
    assert num_cleared > (20 if max_pending == 8 else 0)
