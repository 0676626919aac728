import numpy as np
import pytest
import torch

from pagedkv import RadixCache


def filled(page_size=2, **options):
    """[1 2 | 3 4 | 5 6] on pages 10 11 12, and a branch [1 2 | 7 8] on 10 13."""
    cache = RadixCache(page_size, **options)
    cache.insert([1, 2, 3, 4, 5, 6], [10, 11, 12])
    cache.insert([1, 2, 7, 8], [10, 13])
    return cache


def lookup(cache, token_ids, namespace=None):
    num_tokens, pages, _ = cache.match(token_ids, namespace)
    assert num_tokens == cache.page_size * len(pages)
    return pages.tolist()


def test_match_finds_the_longest_prefix_in_whole_pages():
    cache = filled()
    assert lookup(cache, [1, 2, 3, 4, 5, 6, 7]) == [10, 11, 12]
    assert lookup(cache, [1, 2, 3, 4, 5]) == [10, 11]
    assert lookup(cache, [1, 2, 7, 8]) == [10, 13]
    assert lookup(cache, [1, 2, 3, 9]) == [10]
    assert lookup(cache, [1, 9]) == []
    assert lookup(cache, [1]) == []
    assert lookup(cache, []) == []


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8])
def test_lengths_round_down(page_size, length):
    cache = RadixCache(page_size)
    cache.insert(range(length), range(length // page_size))
    assert cache.num_cached_pages == length // page_size
    assert lookup(cache, range(100)) == list(range(length // page_size))


def test_insert_keeps_what_is_there():
    cache = filled()
    result = cache.insert([1, 2, 3, 4, 9, 9], [20, 21, 22])
    assert result.num_cached == 4
    assert result.handle.num_tokens == 6
    assert lookup(cache, [1, 2, 3, 4, 9, 9]) == [10, 11, 22]
    assert cache.num_cached_pages == 5
    # Pages 20 and 21 were not taken: they may be given for other tokens.
    assert cache.insert([5, 5, 6, 6], [20, 21]).num_cached == 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_arrays_of_the_caller_are_copied(dtype):
    tokens, pages = np.array([1, 2, 3, 4], dtype), np.array([5, 6], dtype)
    cache = RadixCache(2)
    cache.insert(tokens, pages)
    tokens[:], pages[:] = 9, 9
    assert lookup(cache, torch.tensor([1, 2, 3, 4])) == [5, 6]
    result = cache.match([1, 2, 3, 4]).pages
    result[:] = 0
    assert lookup(cache, [1, 2, 3, 4]) == [5, 6]


def test_counters_follow_locks():
    cache = filled()
    handle = cache.match([1, 2, 3, 4]).handle
    cache.lock(handle)
    cache.lock(handle)
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (4, 2)
    cache.unlock(handle)
    assert cache.num_evictable_pages == 2
    cache.unlock(handle)
    assert cache.num_evictable_pages == 4


def test_locked_prefix_survives_eviction_of_everything_else():
    cache = filled()
    handle = cache.match([1, 2, 3, 4]).handle
    cache.lock(handle)
    assert sorted(cache.evict(100).tolist()) == [12, 13]
    assert lookup(cache, [1, 2, 3, 4, 5, 6]) == [10, 11]
    cache.unlock(handle)
    assert cache.evict(100).tolist() == [11, 10]
    assert cache.num_cached_pages == cache.num_evictable_pages == 0


def test_handle_survives_a_split():
    cache = RadixCache(1)
    whole = cache.insert([1, 2, 3, 4], [0, 1, 2, 3]).handle
    cache.lock(whole)
    part = cache.match([1, 2, 9]).handle
    cache.lock(part)
    assert cache.num_evictable_pages == 0
    cache.unlock(whole)
    assert cache.num_evictable_pages == 2
    assert cache.evict(10).tolist() == [2, 3]
    cache.unlock(part)
    assert cache.num_evictable_pages == 2


def test_unlocking_more_often_than_locking_is_refused():
    cache = filled()
    deep, shallow = cache.match([1, 2, 3, 4, 5, 6]).handle, cache.match([1, 2]).handle
    cache.lock(deep)
    # The shallow node is locked through the deep one, but nobody locked its own handle.
    with pytest.raises(ValueError, match="handle must be locked, got one of 2 tokens that is not"):
        cache.unlock(shallow)
    cache.unlock(deep)
    with pytest.raises(ValueError, match="handle must be locked"):
        cache.unlock(deep)
    assert cache.num_evictable_pages == 4


@pytest.mark.parametrize("num_evicted", [1, 3], ids=["trimmed", "removed"])
def test_stale_handle_is_refused(num_evicted):
    cache = RadixCache(1)
    handle = cache.insert([1, 2, 3], [0, 1, 2]).handle
    cache.evict(num_evicted)
    with pytest.raises(ValueError, match="handle must name a prefix that is still cached, got one of 3 tokens"):
        cache.lock(handle)
    assert cache.num_evictable_pages == 3 - num_evicted


def test_empty_match_can_be_locked_and_unlocked():
    cache = filled()
    for namespace in (None, "unknown"):
        handle = cache.match([9, 9], namespace).handle
        cache.lock(handle)
        cache.unlock(handle)
    assert cache.num_evictable_pages == 4


def test_eviction_takes_the_tail_first_and_no_more_than_asked():
    cache = RadixCache(1)
    cache.insert(range(5), range(5))
    assert cache.evict(0).tolist() == []
    assert cache.evict(2).tolist() == [3, 4]
    assert lookup(cache, range(5)) == [0, 1, 2]
    assert cache.evict(9).tolist() == [0, 1, 2]
    assert cache.evict(9).tolist() == []


def test_eviction_is_by_last_use_and_leaves_go_before_parents():
    cache = RadixCache(1)
    cache.insert([1, 2], [0, 1])
    cache.insert([3, 4], [2, 3])
    cache.insert([1, 5], [0, 4])
    cache.match([3, 4])
    assert [cache.evict(1).tolist() for _ in range(5)] == [[1], [4], [0], [3], [2]]


def test_partial_hit_refreshes_the_part_that_was_hit():
    cache = RadixCache(1)
    cache.insert([1, 2, 3, 4], [0, 1, 2, 3])
    cache.insert([5, 6], [4, 5])
    cache.match([1, 2, 9])
    # The end of the first run is the oldest now, then [5 6]; the start was used last.
    assert cache.evict(3).tolist() == [2, 3, 5]
    assert lookup(cache, [1, 2]) == [0, 1]


def test_unlock_counts_as_a_use():
    cache = RadixCache(1)
    handle = cache.insert([1], [0]).handle
    cache.lock(handle)
    cache.insert([2], [1])
    cache.unlock(handle)
    assert cache.evict(1).tolist() == [1]


def test_namespaces_do_not_see_each_other():
    cache = RadixCache(1)
    namespaces = [None, "", 0, False, 1, True, b"", b"a", "a", "ab", ("a", "b"), ("ab",), (None,), (0,), (False,), ()]
    for page, namespace in enumerate(namespaces):
        assert cache.insert([7], [page], namespace).num_cached == 0
    assert [lookup(cache, [7], namespace) for namespace in namespaces] == [[page] for page in range(len(namespaces))]


@pytest.mark.parametrize("namespace", [1.5, ["a"], ("a", ["b"]), object()])
def test_other_namespaces_are_refused(namespace):
    with pytest.raises(TypeError, match="namespace must be None, a str, bytes, an int or a tuple of these"):
        RadixCache(1).match([1], namespace)


def test_namespace_without_pages_costs_nothing():
    cache = RadixCache(1)
    for number in range(100):
        cache.match([1], ("tenant", number))
        cache.insert([1], [number], ("tenant", number))
    cache.evict(100)
    assert list(cache.nodes()) == []
    cache.insert([1], [0], ("tenant", 5))
    assert lookup(cache, [1], ("tenant", 5)) == [0]


def test_reset_needs_no_locks():
    cache = filled()
    handle = cache.match([1, 2]).handle
    cache.lock(handle)
    with pytest.raises(ValueError, match="the cache must not be locked to be reset, got 1 locked pages"):
        cache.reset()
    cache.unlock(handle)
    assert sorted(cache.reset().tolist()) == [10, 11, 12, 13]
    assert lookup(cache, [1, 2]) == []
    assert cache.insert([1, 2], [10]).num_cached == 0


@pytest.mark.parametrize(
    "pages, message",
    [
        ([12, 30], "pages must not be in the cache yet, got page 12"),
        ([30, 30], "pages must name each page once, got page 30 twice"),
        ([-1, 30], r"pages must be in 0..2\*\*31 - 2, got -1..30"),
        ([30], r"pages must have shape \[2\] for 5 tokens \(page_size 2\), got \[1\]"),
        ([30, 31, 32], r"pages must have shape \[2\]"),
    ],
)
def test_wrong_pages_are_refused_before_anything_changes(pages, message):
    cache = filled()
    with pytest.raises(ValueError, match=message):
        cache.insert([8, 8, 9, 9, 9], pages)
    assert cache.num_cached_pages == cache.num_evictable_pages == 4
    assert lookup(cache, [8, 8, 9, 9]) == []
    assert cache.insert([8, 8, 9, 9], [30, 31]).num_cached == 0


def test_pages_must_be_integers():
    with pytest.raises(TypeError, match="pages must be integers, got float64"):
        RadixCache(1).insert([1], [0.5])


def test_extend_grows_a_leaf_that_nobody_else_locks():
    cache = RadixCache(2)
    handle = cache.insert([1, 2], [0]).handle
    cache.lock(handle)
    for page in range(1, 50):
        longer = cache.extend(handle, [page, page], [page]).handle
        cache.lock(longer)
        cache.unlock(handle)
        handle = longer
    assert handle.num_tokens == 100
    assert len([node for node in cache.nodes() if node.parent is not None]) == 1
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (50, 0)
    cache.unlock(handle)
    assert cache.num_evictable_pages == 50
    assert lookup(cache, [1, 2, 1, 1, 2, 2, 9, 9]) == [0, 1, 2]


def test_extend_does_not_pin_pages_through_the_lock_of_another():
    cache = RadixCache(1)
    handle = cache.insert([1], [0]).handle
    cache.lock(handle)
    cache.lock(handle)
    cache.extend(handle, [2], [1])
    assert cache.num_evictable_pages == 1
    assert cache.evict(5).tolist() == [1]


def test_extend_needs_a_current_handle():
    cache = RadixCache(1)
    handle = cache.insert([1], [0]).handle
    with pytest.raises(ValueError, match="handle must name a cached prefix to be extended, got an empty one"):
        cache.extend(cache.match([9]).handle, [1], [5])
    cache.evict(1)
    with pytest.raises(ValueError, match="still cached"):
        cache.extend(handle, [2], [5])


def test_ancestor_names_the_start_of_a_prefix():
    cache = filled()
    handle = cache.match([1, 2, 3, 4, 5, 6]).handle
    cache.lock(handle)
    start = cache.ancestor(handle, 4)
    cache.lock(start)
    cache.unlock(handle)
    assert sorted(cache.evict(9).tolist()) == [12, 13]
    assert cache.ancestor(start, 4) == start
    assert cache.ancestor(start, 0).num_tokens == 0
    assert cache.locked_tokens(start, 0).tolist() == [1, 2, 3, 4]
    assert cache.locked_tokens(start, 3).tolist() == [4]
    for num_tokens in (3, 6):
        with pytest.raises(ValueError, match="num_tokens must be whole pages of 2 and at most 4, got"):
            cache.ancestor(start, num_tokens)


def test_short_prefix_does_not_keep_a_long_run_in_memory():
    cache = RadixCache(1)
    length = 100_000
    cache.insert(np.arange(length), np.arange(length))
    cache.match([*range(10), 0])
    cache.evict(length - 10)
    assert cache.num_cached_pages == 10
    assert sum(node.num_bytes for node in cache.nodes()) < 10_000
    cache.insert(np.arange(length), np.arange(length))
    cache.evict(length - 10)
    assert sum(node.num_bytes for node in cache.nodes()) < 10_000


def test_evict_does_not_walk_the_tree(monkeypatch):
    """Twice the leaves, the same number of looks at nodes."""
    looks = []
    for num_leaves in (200, 400):
        cache = RadixCache(1)
        for leaf in range(num_leaves):
            cache.insert([leaf], [leaf])
        node = type(next(cache.nodes()))
        count = 0
        original = node.is_evictable.fget

        def counted(self, original=original):
            nonlocal count
            count += 1
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(node, "is_evictable", property(counted))
            cache.evict(3)
        looks.append(count)
    assert looks[0] == looks[1] > 0


def test_long_chains_need_no_recursion():
    cache = RadixCache(1)
    handle = cache.insert([0], [0]).handle
    for number in range(1, 1500):
        handle = cache.extend(handle, [number], [number]).handle
    cache.lock(handle)
    assert lookup(cache, range(2000)) == list(range(1500))
    cache.unlock(handle)
    assert len(cache.evict(2000)) == 1500


def test_page_size_must_be_positive():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        RadixCache(0)
