import numpy as np
import pytest

from pagedkv import OutOfPagesError, RadixCache
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


def test_copies_without_a_pool_are_kept_in_order():
    ledger = make_ledger(num_cached=0)
    ledger.copy_page(0, 3)
    ledger.copy_page(4, 1)
    assert ledger.pending_copies == [(0, 3), (4, 1)]
    assert ledger.counters.copied_pages == 2


def test_named_pages_are_owners_less_the_cache():
    ledger = make_ledger(num_cached=2)
    ledger.allocator.retain([1])
    ledger.allocator.allocate(1)
    assert ledger.num_named().tolist() == [0, 1, 1, 0, 0, 0]
