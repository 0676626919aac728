"""A manager's events and its picture."""

import pytest

from pagedkv import HashedPageCache, KVCacheManager
from pagedkv.management import BlockRemoved, BlockStored


@pytest.mark.parametrize("kind", ["radix", "hashed"])
@pytest.mark.parametrize("limits", [None, {"tenant": 2}])
def test_events_say_what_is_cached(kind, limits):
    manager = KVCacheManager(10, page_size=2, prefix_cache=kind, namespace_limits=limits, events=True)
    held = set()
    for namespace in (None, "tenant"):
        with manager.open([1, 2, 3, 4, 5], namespace) as seq:
            seq.append(5)
            seq.commit([1, 2, 3, 4, 5])
    for event in manager.take_events():
        assert isinstance(event, BlockStored)
        assert event.block_size == 2
        held.update(event.block_hashes)
    assert len(held) == 4
    assert manager.take_events() == []
    assert manager.evict() == 4
    for event in manager.take_events():
        assert isinstance(event, BlockRemoved)
        held.difference_update(event.block_hashes)
    assert not held


def test_without_events_there_are_none():
    manager = KVCacheManager(10, page_size=2)
    with manager.open([1, 2]) as seq:
        seq.append(2)
        seq.commit([1, 2])
    assert manager.take_events() == []
    with pytest.raises(ValueError, match="prefix_cache must be made with events=True to give events"):
        KVCacheManager(10, page_size=2, prefix_cache=HashedPageCache(2), events=True)


def test_a_picture():
    manager = KVCacheManager(10, page_size=2)
    with manager.open([1, 2]) as seq:
        seq.append(2)
        assert "0 a........." in manager.draw(tree=False)
    assert manager.draw(form="svg").startswith("<svg")
