"""What is particular to the cache of hashed pages; what it shares with the radix tree is in test_prefix_caches.py."""

import gc
import random
import weakref

import numpy as np
import pytest

from pagedkv import IntegrityError
from pagedkv.management.events import AllBlocksCleared
from pagedkv.management.hashed_cache import HashedPageCache
from pagedkv.management.page_hash import sha256
from pagedkv.testing.prefix_cache_suite import prefix_cache_cases


def constant(data):
    """The worst hash function: all pages of all prompts collide."""
    return b"same"


def one_bit(data):
    """Two lists that every page of every prompt is in."""
    return b"1" if sha256(data)[0] > 127 else b"0"


def last_page_only(data):
    """Forgets what stands before the page: equal pages of different prompts collide."""
    return sha256(data[-16:])


def found(cache, token_ids, namespace=None):
    return cache.match(token_ids, namespace).pages.tolist()


def filled(**options):
    """[1 2 | 3 4 | 5 6] on pages 10 11 12, and a branch [1 2 | 7 8] on 10 13."""
    cache = HashedPageCache(2, **options)
    cache.insert([1, 2, 3, 4, 5, 6], [10, 11, 12])
    cache.insert([1, 2, 7, 8], [10, 13])
    return cache


@pytest.mark.parametrize("page_hash", [constant, one_bit, last_page_only])
@pytest.mark.parametrize("case", prefix_cache_cases(page_sizes=[2]), ids=str)
def test_collisions_change_no_result(case, page_hash):
    case(lambda page_size, *args, **options: HashedPageCache(page_size, *args, page_hash=page_hash, **options))


@pytest.mark.parametrize("page_hash", [constant, last_page_only])
def test_a_hit_is_compared_by_tokens_and_by_what_stands_before(page_hash):
    cache = HashedPageCache(2, page_hash=page_hash)
    cache.insert([1, 2, 3, 4], [0, 1])
    cache.insert([5, 6, 3, 4], [2, 3])
    cache.insert([1, 2, 3, 4], [4, 5], "other")
    assert found(cache, [1, 2, 3, 4]) == [0, 1]
    assert found(cache, [5, 6, 3, 4]) == [2, 3]
    assert found(cache, [1, 2, 3, 4], "other") == [4, 5]
    assert found(cache, [3, 4]) == []
    assert found(cache, [1, 2, 9, 9]) == [0]
    cache.sanity_check()


def test_comparison_is_what_tells_colliding_pages_apart(monkeypatch):
    """Without it the same lookup is a wrong hit, so the test above can fail."""
    cache = HashedPageCache(2, page_hash=constant)
    cache.insert([1, 2], [0])
    page = cache._by_page[0]

    class EqualToAll(bytes):
        __hash__ = bytes.__hash__

        def __ne__(self, other):
            return False

    page.token_bytes = EqualToAll(page.token_bytes)
    assert found(cache, [8, 8]) == [0]


def test_each_page_of_a_collision_can_be_dropped():
    for order in range(3):
        cache = HashedPageCache(1, page_hash=constant)
        for number in range(3):
            cache.insert([number], [number])
        for number in (order, (order + 1) % 3):
            cache.match([number])
        left = [(order + 2) % 3, order, (order + 1) % 3]
        while left:
            assert cache.evict(1).tolist() == left[:1]
            left = left[1:]
            cache.sanity_check()
            assert [number for number in range(3) if found(cache, [number])] == sorted(left)
            cache.evict(0)
            for number in left:
                cache.match([number])


def test_a_use_costs_the_same_for_a_prompt_of_any_length():
    """Locks and uses stop at what is locked already; a page decoded is a few steps, however many stand before it."""
    cache = HashedPageCache(1)
    handle = cache.insert(np.arange(3000), np.arange(3000)).handle
    cache.lock(handle)
    page = cache._by_page[2999].parent
    # A step further up would raise.
    before, page.parent = page.parent, None
    longer = cache.extend(handle, [7], [5000]).handle
    cache.lock(longer)
    cache.unlock(handle)
    page.parent = before
    assert cache.num_evictable_pages == 0
    cache.unlock(longer)
    assert cache.num_evictable_pages == 3001
    cache.sanity_check()


def test_nodes_are_runs_with_what_ran_through_them():
    cache = filled(eviction="lru")
    handle = cache.match([1, 2, 3, 4]).handle
    cache.lock(handle)
    cache.insert([9, 9], [20], "other")
    cache.match([1, 2, 7, 8])
    runs = list(cache.nodes())
    assert [run.namespace for run in runs if run.parent is None] == [None, "other"]
    by_page = {tuple(run.pages.tolist()): run for run in runs}
    assert set(by_page) == {(), (10,), (11,), (12,), (13,), (20,)}
    first, middle, branch = by_page[10,], by_page[11,], by_page[13,]
    assert middle.parent is first
    assert {tuple(child.pages) for child in first.children} == {(11,), (13,)}
    assert middle.tokens.tolist() == [3, 4]
    assert (first.locks, first.anchors, middle.locks, middle.anchors, branch.locks) == (1, 0, 1, 1, 0)
    assert (first.num_hits, middle.num_hits, branch.num_hits) == (2, 1, 1)
    assert first.last_access == branch.last_access > middle.last_access
    assert (branch.is_evictable, middle.is_evictable, by_page[12,].is_evictable) == (True, False, True)
    cache.unlock(handle)
    (whole,) = [run.pages.tolist() for run in cache.nodes() if 11 in run.pages]
    assert whole == [11, 12]


@pytest.mark.parametrize("drop", ["forget", "reset", "evict"])
def test_pages_of_a_long_prompt_are_freed_without_recursion(drop):
    cache = HashedPageCache(1)
    handle = cache.insert(np.arange(30_000), np.arange(30_000)).handle
    last = weakref.ref(cache._queue)
    if drop != "forget":
        getattr(cache, drop)(*([30_000] if drop == "evict" else []))
        assert cache.num_cached_pages == 0
    del cache, handle
    gc.collect()
    assert last() is None


def test_num_bytes_follows_what_is_held():
    cache = HashedPageCache(16)
    empty = cache.num_bytes
    cache.insert(np.arange(16_000), np.arange(1000))
    assert 16_000 * 8 < cache.num_bytes - empty < 16_000 * 8 + 1000 * 600
    assert (cache.num_cached_tokens, cache.num_evictable_tokens) == (16_000, 16_000)
    cache.reset()
    assert cache.num_bytes == empty


def test_sizes_and_repr():
    cache = filled()
    cache.lock(cache.match([1, 2]).handle)
    assert (cache.num_cached_tokens, cache.num_evictable_tokens) == (8, 6)
    assert repr(cache) == (
        "HashedPageCache(page_size=2, eviction=LRUPolicy(), num_cached_pages=4, num_evictable_pages=3)"
    )


def test_page_hash_must_be_a_function():
    with pytest.raises(TypeError, match="page_hash must be a function of bytes, got str"):
        HashedPageCache(2, page_hash="sha256")


def test_random_programs_stay_sane():
    random.seed(5)
    for page_hash in (sha256, one_bit):
        cache, free, handles = HashedPageCache(1, page_hash=page_hash), list(range(80)), []
        for _ in range(400):
            word = [random.randrange(3) for _ in range(random.randrange(1, 8))]
            if random.random() < 0.5 and len(free) >= len(word):
                pages = [free.pop() for _ in word]
                result = cache.insert(word, pages)
                free += pages[: result.num_cached]
                handle = result.handle
            else:
                handle = cache.match(word).handle
            if random.random() < 0.3:
                cache.lock(handle)
                handles.append(handle)
            if handles and random.random() < 0.3:
                cache.unlock(handles.pop(random.randrange(len(handles))))
            free += cache.evict(random.choice((0, 0, 1, 3))).tolist()
            cache.sanity_check()
            assert len(free) + cache.num_cached_pages == 80


def break_count(cache):
    cache._by_page[10].num_children -= 1


def break_lock(cache):
    cache._by_page[10].locks += 1


def break_anchor(cache):
    cache._by_page[12].anchors += 1


def break_tokens(cache):
    cache._by_page[11].token_bytes = bytes(16)


def break_table(cache):
    cache._table.remove(cache._by_page[13])


def break_page(cache):
    cache._by_page[11].page = 12


def break_chain(cache):
    del cache._by_page[10]


def break_queue(cache):
    cache._by_page[13].queued_serial = None


def break_counter(cache):
    cache._num_locked_pages += 1


def break_root(cache):
    next(iter(cache._roots.values())).num_children += 1


@pytest.mark.parametrize(
    "plant, evidence",
    [
        (break_count, "page 10 counts 1 pages behind it"),
        (break_lock, "page 10 counts 1 locks, 0 of them by name"),
        (break_anchor, "page 12 counts 0 locks, 1 of them by name"),
        (break_tokens, "page 11 is filed wrongly"),
        (break_table, "page 13 is filed wrongly"),
        (break_page, "page 11 is filed wrongly"),
        (break_chain, "continues a page that is not cached|a root counts"),
        (break_queue, "page 13 is evictable and not in the eviction queue"),
        (break_counter, "the cache counts 1 locked pages, 0 are"),
        (break_root, "a root counts 2 prompts"),
    ],
)
def test_sanity_check_finds(plant, evidence):
    cache = filled()
    cache.sanity_check()
    plant(cache)
    with pytest.raises(IntegrityError, match=evidence):
        cache.sanity_check()


def test_events_are_those_of_sha256_whatever_the_table_hashes_with():
    logs = []
    for page_hash in (sha256, constant):
        cache = filled(events=True, page_hash=page_hash)
        cache.evict(1)
        logs.append(cache.events.take())
        cache.reset()
        assert cache.events.take() == [AllBlocksCleared()]
    assert logs[0] == logs[1]
