import pytest

from pagedkv import KVCacheManager


def cached(manager, tokens, namespace=None):
    seq = manager.open(tokens, namespace)
    seq.append(len(tokens) - seq.num_tokens)
    seq.commit(tokens)
    seq.close()


def make_manager(**options):
    return KVCacheManager(6, page_size=2, debug=True, **options)


@pytest.mark.parametrize("prefix_cache", ["radix", "hashed"])
def test_pinned_pages_are_not_evicted(prefix_cache):
    manager = make_manager(prefix_cache=prefix_cache)
    cached(manager, [1, 2, 3, 4, 5, 6])
    pin = manager.pin([1, 2, 3, 4, 9])
    assert (pin.num_tokens, pin.is_pinned, repr(pin)) == (4, True, "PinnedPrefix(4 tokens, pinned)")
    assert manager.evict() == 1
    stats = manager.stats()
    assert (stats.cached, stats.evictable, stats.owned) == (2, 0, 0)
    assert manager.open([1, 2, 3, 4]).page_ids == pin.page_ids
    pin.unpin()
    pin.unpin()
    assert (pin.is_pinned, pin.page_ids) == (False, ())


def test_pin_of_nothing_cached_holds_nothing():
    for options in ({}, {"prefix_cache": False}):
        with make_manager(**options).pin([1, 2]) as pin:
            assert (pin.num_tokens, pin.page_ids) == (0, ())
        assert not pin.is_pinned


def test_a_prefix_that_grows_behind_a_pin_is_evicted_down_to_it():
    manager = make_manager()
    seq = manager.open([])
    seq.append(4)
    seq.commit([1, 2, 3, 4])
    manager.pin([1, 2, 3, 4])
    seq.append(4)
    seq.commit([5, 6, 7, 8])
    seq.close()
    assert manager.evict() == 2
    assert manager.open([1, 2, 3, 4]).num_cached_tokens == 4


def test_pins_of_namespaces_are_apart():
    manager = make_manager()
    cached(manager, [1, 2], "a")
    assert manager.pin([1, 2]).num_tokens == 0
    assert manager.pin([1, 2], "a").namespace == "a"
    assert manager.evict() == 0
