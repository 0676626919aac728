import numpy as np
import pytest

from pagedkv import KVCacheManager, OutOfPagesError, RadixCache, check_integrity
from pagedkv.management.ledger import PageLedger
from pagedkv.management.page_budget import PageBudget


def make_budget(num_cached, limited=None):
    """Six pages of two tokens, the first ones in the cache alone."""
    cache = RadixCache(2)
    budget = PageBudget(6)
    PageLedger(budget, 2, cache, limited)
    cache.insert(np.arange(2 * num_cached), budget.allocator.allocate(num_cached))
    return budget


def test_obtain_takes_free_pages_before_it_evicts():
    budget = make_budget(num_cached=3)
    assert budget.obtain(3).tolist() == [3, 4, 5]
    assert budget.counters.evicted_pages == 0
    assert sorted(budget.obtain(2).tolist()) == [1, 2]
    assert budget.counters.evicted_pages == 2
    assert budget.caches[0].num_cached_pages == 1


def test_obtain_too_many_evicts_nothing():
    budget = make_budget(num_cached=3)
    budget.obtain(2)
    assert not budget.can_obtain(5)
    with pytest.raises(OutOfPagesError, match="cannot allocate 5 pages: 1 free, 3 evictable, 2 pinned by 0 sequences"):
        budget.obtain(5)
    assert budget.caches[0].num_cached_pages == 3


def test_copies_without_a_pool_hold_their_source_until_they_are_taken():
    budget = make_budget(num_cached=0)
    pages = budget.allocator.allocate(3)
    budget.copy_pages([(0, 1), (0, 2)])
    assert budget.counters.copied_pages == 2
    assert not budget.is_shared(0)
    budget.allocator.release(pages[:1])
    assert budget.allocator.allocate(3).tolist() == [3, 4, 5]
    assert budget.take_copies() == [(0, 1), (0, 2)]
    assert budget.allocator.allocate(1).tolist() == [0]
    assert budget.take_copies() == []


def test_pages_kept_free_are_left_and_count_as_pinned():
    budget = make_budget(num_cached=3)
    assert budget.can_obtain(4, num_kept_free=2)
    assert not budget.can_obtain(5, num_kept_free=2)
    with pytest.raises(OutOfPagesError, match="cannot allocate 5 pages: 1 free, 3 evictable, 2 pinned by 0 sequences"):
        budget.obtain(5, num_kept_free=2)
    assert budget.obtain(4, num_kept_free=2).tolist() == [2, 3, 4, 5]
    assert budget.can_obtain(0, num_kept_free=2)


def test_pages_handed_over_have_one_owner():
    budget = make_budget(num_cached=0)
    pages = budget.allocator.allocate(3)
    budget.allocator.retain(pages[:2])
    budget.copy_pages([(1, 2)])
    budget.hand_over(pages)
    assert budget.allocator.owner_counts_of(pages).tolist() == [1, 2, 1]


def test_fullest_cache_is_evicted_first():
    other = RadixCache(2)
    budget = make_budget(num_cached=2, limited={"other": (other, 9)})
    other.insert(np.arange(6), budget.allocator.allocate(3))
    assert (budget.num_evictable, budget.evict(2)) == (5, 2)
    assert [cache.num_cached_pages for cache in budget.caches] == [2, 1]
    assert budget.evict(9) == 3
    assert budget.allocator.num_free == 6


def test_what_waits_to_be_copied_from_does_not_count_as_freed():
    budget = make_budget(num_cached=2)
    budget.copy_pages([(0, 2)])
    assert budget.evict(2) == 1
    assert budget.allocator.num_free == 5
    budget.take_copies()
    assert budget.allocator.num_free == 6


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
