"""What a RadixCache tells its log: pages that came, in order of their prefix, and pages that left."""

import pytest

from pagedkv import RadixCache
from pagedkv.management.events import AllBlocksCleared, BlockRemoved, BlockStored

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
