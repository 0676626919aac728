"""Who may take the last pages, and how many a namespace may keep."""

import pytest

from pagedkv import KVCacheManager, OutOfPagesError, RadixCache


def cached(manager, tokens, namespace=None):
    seq = manager.open(tokens, namespace)
    seq.append(len(tokens) - seq.num_tokens)
    seq.commit(tokens)
    seq.close()


@pytest.mark.parametrize("watermark", [2, 0.2, 0.15])
def test_first_slots_leave_the_watermark_and_later_ones_may_take_it(watermark):
    manager = KVCacheManager(10, page_size=2, watermark=watermark, debug=True)
    running = manager.open([])
    running.append(14)
    new = manager.open([])
    assert not manager.can_append(4)
    assert manager.can_append(2)
    assert not new.can_append(4)
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 1 free, 0 evictable, 9 pinned by 2 sequences"):
        new.append(4)
    assert not manager.can_batch([new], 3)
    assert manager.can_batch([new], 2)
    assert new.try_append(4) is None
    assert running.append(4).shape == (4,)
    # Nothing but the watermark is left, and a new one may not take any of it.
    assert new.try_append(1) is None
    assert running.append(2).shape == (2,)
    assert manager.num_free_pages == 0


def test_evictable_pages_count_for_the_watermark():
    manager = KVCacheManager(4, page_size=2, watermark=2, debug=True)
    cached(manager, [1] * 4)
    seq = manager.open([])
    assert seq.append(4).shape == (4,)
    assert manager.stats().evicted_pages == 0
    with pytest.raises(OutOfPagesError, match="cannot allocate 1 page: 0 free, 0 evictable, 4 pinned"):
        manager.open([]).append(1)


@pytest.mark.parametrize("page_size", [1, 4])
def test_what_is_admitted_by_pages_fits(page_size):
    """A reservation counts whole pages, as the allocation does: many short prompts cannot pass by their tokens."""
    manager = KVCacheManager(8, page_size=page_size, debug=True)
    seqs = []
    while manager.can_append(1):
        seqs.append(manager.open([]))
        seqs[-1].append(1)
    assert len(seqs) == 8


def test_a_hit_is_no_longer_evictable_for_the_rest_of_the_prompt():
    manager = KVCacheManager(4, page_size=2, debug=True)
    cached(manager, [1] * 8)
    seq = manager.open([1] * 8 + [2])
    assert (manager.num_evictable_pages, seq.can_append(1)) == (0, False)


@pytest.mark.parametrize(
    "watermark, error, message",
    [
        (-1, ValueError, "watermark must be at least 0, got -1"),
        (10, ValueError, r"watermark must be below 10 \(num_pages\), got 10"),
        (1.0, ValueError, r"watermark must be a part in \[0, 1\) or a number of pages, got 1.0"),
        ("1", TypeError, "watermark must be an int, got str"),
    ],
)
def test_watermark_is_checked(watermark, error, message):
    with pytest.raises(error, match=message):
        KVCacheManager(10, page_size=2, watermark=watermark)


@pytest.mark.parametrize("prefix_cache", [True, "hashed"])
def test_a_namespace_makes_room_for_its_own(prefix_cache):
    limits = {"tenant": 2}
    manager = KVCacheManager(12, page_size=2, prefix_cache=prefix_cache, namespace_limits=limits, debug=True)
    cached(manager, [9] * 4)
    for first in (1, 3, 5):
        cached(manager, [first, first + 1], "tenant")
    assert manager.open([1, 2], "tenant").num_cached_tokens == 0
    assert manager.open([5, 6], "tenant").num_cached_tokens == 2
    assert manager.open([9] * 4).num_cached_tokens == 4
    # Of a longer prompt the beginning is kept.
    cached(manager, [7, 7, 8, 8, 9, 9], "tenant")
    assert manager.open([7, 7, 8, 8, 9, 9], "tenant").num_cached_tokens == 2
    assert manager.stats().published == 4


def test_a_namespace_without_a_page():
    manager = KVCacheManager(12, page_size=2, namespace_limits={None: 0}, debug=True)
    cached(manager, [1, 2])
    assert manager.open([1, 2]).num_cached_tokens == 0


def test_limited_namespaces_are_evicted_too():
    manager = KVCacheManager(4, page_size=2, namespace_limits={"a": 3}, debug=True)
    cached(manager, [1] * 6, "a")
    cached(manager, [2, 2])
    assert (manager.num_free_pages, manager.num_evictable_pages) == (0, 4)
    assert manager.open([]).append(8).shape == (8,)


@pytest.mark.parametrize(
    "prefix_cache, error, message",
    [
        ("tree", ValueError, "prefix_cache must be"),
        (3, TypeError, "prefix_cache must be a bool, a name or a cache, got int"),
        (RadixCache(4), ValueError, r"prefix_cache must have page_size 2 \(the pool's\), got 4"),
    ],
)
def test_prefix_cache_is_checked(prefix_cache, error, message):
    with pytest.raises(error, match=message):
        KVCacheManager(4, page_size=2, prefix_cache=prefix_cache)


def test_prefix_cache_may_be_an_instance():
    cache = RadixCache(2)
    manager = KVCacheManager(4, page_size=2, prefix_cache=cache, debug=True)
    cached(manager, [1, 2])
    assert cache.num_cached_pages == 1
    with pytest.raises(ValueError, match="prefix_cache must be empty, got one of 1 pages"):
        KVCacheManager(4, page_size=2, prefix_cache=cache)
    with pytest.raises(ValueError, match="must be True or a name for namespace_limits, got a cache"):
        KVCacheManager(4, page_size=2, prefix_cache=RadixCache(2), namespace_limits={"a": 1})


@pytest.mark.parametrize("prefix_cache", ["radix", "hashed"])
def test_what_was_opened_with_a_higher_priority_is_evicted_later(prefix_cache):
    manager = KVCacheManager(2, page_size=2, prefix_cache=prefix_cache, eviction="priority", debug=True)
    for tokens, priority in (([1, 1], 5), ([2, 2], 0)):
        with manager.open(tokens, priority=priority) as seq:
            seq.append(2)
            seq.commit(tokens)
    manager.open([]).append(1)
    assert manager.open([1, 1]).num_cached_tokens == 2
    with pytest.raises(TypeError, match="priority must be an int, got float"):
        manager.open([], priority=1.0)
