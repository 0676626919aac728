import numpy as np
import pytest

from pagedkv import KVCacheManager, OutOfPagesError, RadixCache, check_integrity
from pagedkv.management.ledger import PageLedger


def make_ledger(num_cached):
    """Six pages of two tokens, the first ones in the cache alone."""
    cache = RadixCache(2)
    ledger = PageLedger(6, 2, None, cache)
    pages = ledger.allocator.allocate(num_cached)
    cache.insert(np.arange(2 * num_cached), pages)
    return ledger


def test_obtain_takes_free_pages_before_it_evicts():
    ledger = make_ledger(num_cached=3)
    assert ledger.obtain(3).tolist() == [3, 4, 5]
    assert ledger.counters.evicted_pages == 0
    assert sorted(ledger.obtain(2).tolist()) == [1, 2]
    assert ledger.counters.evicted_pages == 2
    assert ledger.cache.num_cached_pages == 1


def test_obtain_too_many_evicts_nothing():
    ledger = make_ledger(num_cached=3)
    ledger.obtain(2)
    assert not ledger.can_obtain(5)
    with pytest.raises(OutOfPagesError, match="cannot allocate 5 pages: 1 free, 3 evictable, 2 pinned by 0 sequences"):
        ledger.obtain(5)
    assert ledger.cache.num_cached_pages == 3


def test_verify_runs_once_at_the_end_of_the_outermost_call():
    ledger = make_ledger(num_cached=0)
    calls = []
    ledger.verify = lambda: calls.append(ledger.lock.acquire(blocking=False) and ledger.lock.release())
    with ledger:
        with ledger:
            pass
        assert not calls
    assert calls == [None]


def test_lock_is_free_after_an_error_inside():
    ledger = make_ledger(num_cached=0)

    def fail():
        with ledger:
            raise RuntimeError("inside")

    ledger.verify = lambda: None
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert ledger.lock.acquire(blocking=False)
    ledger.lock.release()


def test_copies_without_a_pool_hold_their_source_until_they_are_taken():
    ledger = make_ledger(num_cached=0)
    pages = ledger.allocator.allocate(3)
    ledger.copy_pages([(0, 1), (0, 2)])
    assert ledger.counters.copied_pages == 2
    assert not ledger.is_shared(0)
    ledger.allocator.release(pages[:1])
    assert ledger.allocator.allocate(3).tolist() == [3, 4, 5]
    assert ledger.take_copies() == [(0, 1), (0, 2)]
    assert ledger.allocator.allocate(1).tolist() == [0]
    assert ledger.take_copies() == []


def test_pages_kept_free_are_left_and_count_as_pinned():
    ledger = make_ledger(num_cached=3)
    assert ledger.can_obtain(4, num_kept_free=2)
    assert not ledger.can_obtain(5, num_kept_free=2)
    with pytest.raises(OutOfPagesError, match="cannot allocate 5 pages: 1 free, 3 evictable, 2 pinned by 0 sequences"):
        ledger.obtain(5, num_kept_free=2)
    assert ledger.obtain(4, num_kept_free=2).tolist() == [2, 3, 4, 5]
    assert ledger.can_obtain(0, num_kept_free=2)


def test_pages_handed_over_have_one_owner():
    ledger = make_ledger(num_cached=0)
    pages = ledger.allocator.allocate(3)
    ledger.allocator.retain(pages[:2])
    ledger.copy_pages([(1, 2)])
    ledger.hand_over(pages)
    assert ledger.allocator.owner_counts_of(pages).tolist() == [1, 2, 1]


def test_fullest_cache_is_evicted_first():
    ledger = make_ledger(num_cached=2)
    other = RadixCache(2)
    ledger.limited["other"] = other, 9
    other.insert(np.arange(6), ledger.allocator.allocate(3))
    assert (ledger.num_evictable, ledger.evict(2)) == (5, 2)
    assert (ledger.cache.num_cached_pages, other.num_cached_pages) == (2, 1)
    assert ledger.evict(9) == 3
    assert ledger.allocator.num_free == 6


def test_a_page_that_is_yet_to_be_copied_from_is_no_room():
    manager = KVCacheManager(4, page_size=2)
    first = manager.open([1, 2])
    first.append(2)
    first.commit([1, 2])
    first.truncate(1)
    first.append(1)  # the page is the prefix cache's: it is copied, later
    second = manager.open([9])
    assert (manager.num_free_pages, manager.num_evictable_pages) == (2, 1)
    assert not second.can_append(6)
    assert second.try_append(6) is None
    with pytest.raises(OutOfPagesError, match="pages"):
        second.append(6)
    assert (manager.num_free_pages, manager.num_evictable_pages) == (2, 1)
    assert [pages.tolist() for pages in manager.take_copies()] == [[0], [1]]
    assert second.append(6).shape == (6,)
    check_integrity(manager)
