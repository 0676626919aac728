import copy

import numpy as np
import pytest
import torch

from pagedkv import BackendUnavailableError, RadixCache
from pagedkv.management.eviction import LRUPolicy

BOTH_CORES = ["python", pytest.param("native", marks=pytest.mark.native)]


@pytest.fixture(autouse=True, params=BOTH_CORES)
def core(request, monkeypatch):
    """The core that a cache of these tests has."""
    if request.param == "python":
        monkeypatch.setenv("PAGEDKV_NATIVE", "0")
    else:
        monkeypatch.delenv("PAGEDKV_NATIVE", raising=False)
    assert RadixCache(1).core == request.param
    return request.param


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


def test_lock_protects_the_node_that_is_named():
    """Not only those above it."""
    cache = RadixCache(1)
    handle = cache.insert([1, 2], [0, 1]).handle
    cache.lock(handle)
    assert (cache.num_evictable_pages, cache.evict(5).tolist()) == (0, [])


def test_split_passes_the_locks_on():
    """Locked before a split of its run by a match, an insert and an ancestor; unlocked after."""
    cache = RadixCache(1)
    handle = cache.insert(range(8), range(8)).handle
    for _ in range(3):
        cache.lock(handle)
    cache.match([0, 1, 2, 3, 4, 5, 99])
    cache.insert([0, 1, 2, 3, 98], [10, 11, 12, 13, 14])
    cache.ancestor(handle, 2)
    assert [node.locks for node in cache.nodes() if 7 in node.pages or 0 in node.pages] == [3, 3]
    for left in (2, 1, 0):
        assert cache.evict(99).tolist() == ([14] if left == 2 else [])
        cache.unlock(handle)
    assert cache.evict(99).tolist() == [6, 7, 4, 5, 2, 3, 0, 1]
    cache.sanity_check()


def test_namespaces_do_not_collide_by_concatenation():
    cache = RadixCache(1)
    namespaces = [("a", "bc"), ("ab", "c"), "abc", b"abc", ("abc",), (("a",), "bc"), (1, "2"), (12,), "12", 12]
    for page, namespace in enumerate(namespaces):
        assert cache.insert([7], [page], namespace).num_cached == 0
    assert [lookup(cache, [7], namespace) for namespace in namespaces] == [[page] for page in range(len(namespaces))]


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
    # A bit for each page id ever seen remains.
    assert cache.num_bytes < 30_000
    cache.insert(np.arange(length), np.arange(length))
    cache.evict(length - 10)
    assert cache.num_bytes < 30_000


@pytest.mark.parametrize("page_size", [1, 16])
def test_memory_is_that_of_the_ids(core, page_size):
    """Of the native core; Python keeps 64 bits a token."""
    cache = RadixCache(page_size)
    rng = np.random.default_rng(0)
    num_tokens, pages = 0, 0
    handle = None
    for turn in range(200):
        ids = rng.integers(0, 2**17, 2048, np.int32)
        new = np.arange(pages, pages + 2048 // page_size, dtype=np.int32)
        pages += len(new)
        if turn % 4 == 0:
            handle = cache.insert(ids, new).handle
        else:
            cache.lock(handle)
            longer = cache.extend(handle, ids, new).handle
            cache.unlock(handle)
            handle = longer
        num_tokens += 2048
    most = 1.2 if core == "native" else 4
    assert cache.num_bytes < most * 4 * (num_tokens + pages)


class CountingLRU(LRUPolicy):
    looks = 0

    def priority(self, run):
        self.looks += 1
        return super().priority(run)


def test_evict_does_not_walk_the_tree():
    """Twice the leaves, the same number of looks at them."""
    looks = []
    for num_leaves in (200, 400):
        policy = CountingLRU()
        cache = RadixCache(1, policy)
        for leaf in range(num_leaves):
            cache.insert([0, leaf, leaf], [0, 2 * leaf + 1, 2 * leaf + 2])
        policy.looks = 0
        cache.evict(7)
        looks.append(policy.looks)
    assert looks[0] == looks[1] < 20


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


def test_sizes_in_pages_and_tokens():
    cache = filled()
    cache.lock(cache.match([1, 2, 3, 4]).handle)
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (4, 2)
    assert (cache.num_cached_tokens, cache.num_evictable_tokens) == (8, 4)
    assert repr(cache) == (
        f"RadixCache(page_size=2, eviction=LRUPolicy(), core='{cache.core}', num_cached_pages=4, num_evictable_pages=2)"
    )


@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 255, 256])
def test_pages_of_any_size(page_size):
    """Runs that part ways in the last token of a page, or in the first of the next."""
    cache = RadixCache(page_size)
    rng = np.random.default_rng(page_size)
    story = rng.integers(0, 50_000, 8 * page_size, np.int32)
    cache.insert(story, range(8))
    for position in (4 * page_size - 1, 4 * page_size, 8 * page_size - 1):
        other = story.copy()
        other[position] += 1
        assert lookup(cache, other) == list(range(position // page_size))
    cache.sanity_check()
    assert lookup(cache, story) == list(range(8))


class OtherTensor:
    """A tensor of a library that is not torch or numpy."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def read_only(ids):
    array = np.array(ids, np.int32)
    array.flags.writeable = False
    return array


def unaligned(ids):
    array = np.frombuffer(b"x" + np.array(ids, np.int32).tobytes(), np.int32, offset=1)
    assert not array.flags.aligned
    return array


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        np.array,
        lambda ids: np.array(ids, np.int32),
        lambda ids: np.array(ids, ">i4"),
        lambda ids: np.repeat(np.array(ids, np.int32), 2)[::2],
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: torch.tensor(ids).repeat_interleave(2)[::2],
        lambda ids: OtherTensor(np.array(ids, np.int32)),
        read_only,
        unaligned,
    ],
    ids="tuple int64 int32 big-endian strided torch64 torch32 torch-strided dlpack read-only unaligned".split(),  # noqa: SIM905
)
def test_token_ids_come_in_any_form(form):
    cache = RadixCache(2)
    handle = cache.insert(form([1, 2, 3, 4]), [0, 1]).handle
    cache.extend(handle, form([5, 6, 7]), np.array([2], np.int16))
    assert lookup(cache, form([1, 2, 3, 4, 5, 6, 9])) == [0, 1, 2]
    assert lookup(cache, [1, 2, 3, 4, 5, 6]) == [0, 1, 2]


@pytest.mark.parametrize(
    "given, error, message",
    [
        ("abc", TypeError, "token_ids must be a list of ints, a numpy array or a torch tensor, got str"),
        ([1, -2], ValueError, "token_ids must be 0 or more, got -2 at position 1"),
        (np.array([1, 2, -7]), ValueError, "token_ids must be 0 or more, got -7 at position 2"),
        (np.array([[1]]), ValueError, r"token_ids must have shape \[n\], got \[1, 1\]"),
        (np.array(1), ValueError, r"token_ids must have shape \[n\], got \[\]"),
        (np.array([1.0]), TypeError, "token_ids must have dtype int32 or int64, got float64"),
        (torch.tensor([1], dtype=torch.uint8), TypeError, "token_ids must have dtype int32 or int64, got uint8"),
        (torch.tensor([1], device="meta"), ValueError, "token_ids must be on the CPU, got meta"),
        (OtherTensor(np.array([1]), (2, 0)), ValueError, "token_ids must be on the CPU, got a OtherTensor"),
    ],
)
def test_wrong_token_ids_are_refused_by_every_call(given, error, message):
    cache = filled()
    handle = cache.match([1, 2]).handle
    calls = [
        lambda: cache.match(given),
        lambda: cache.match(given, "unknown"),
        lambda: cache.insert(given, [30]),
        lambda: cache.insert(given, [30], "unknown"),
        lambda: cache.extend(handle, given, [30]),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    assert cache.num_cached_pages == 4
    cache.sanity_check()


def test_ids_beyond_32_bits_lie_beside_others():
    cache = RadixCache(1)
    big = 2**31
    handle = cache.insert(np.array([1, 2], np.int32), [0, 1]).handle
    cache.lock(handle)
    longer = cache.extend(handle, [big, big + 1, 3], [2, 3, 4]).handle
    assert lookup(cache, [1, 2, big, big + 1, 3]) == [0, 1, 2, 3, 4]
    assert lookup(cache, [1, 2, big, 2**40]) == [0, 1, 2]
    # The same lower 32 bits are not the same id.
    assert lookup(cache, [1 + 2**32, 2]) == []
    assert cache.insert([2**62, 5, 6], [7, 8, 9]).num_cached == 0
    assert lookup(cache, [2**62, 5, 7]) == [7, 8]
    assert cache.locked_tokens(longer, 1).tolist() == [2, big, big + 1, 3]
    cache.sanity_check()


@pytest.mark.parametrize(
    "priority, error, message",
    [
        (0.5, TypeError, "priority must be an int, got float"),
        (True, TypeError, "priority must be an int, got bool"),
        (2**63, ValueError, r"priority must be below 2\*\*63, got 9223372036854775808"),
        (-(2**63) - 1, ValueError, "priority must be at least -9223372036854775808, got -9223372036854775809"),
    ],
)
def test_wrong_priority_is_refused(priority, error, message):
    cache = filled()
    handle = cache.match([1, 2]).handle
    for call in (
        lambda: cache.insert([9, 9], [30], priority=priority),
        lambda: cache.extend(handle, [9], [], priority=priority),
    ):
        with pytest.raises(error, match=message):
            call()
    assert cache.num_cached_pages == 4


def test_priorities_of_64_bits_are_in_order():
    cache = RadixCache(1, "priority")
    for page, priority in enumerate([0, 2**63 - 1, -(2**63), 2**63 - 2, 2**31]):
        handle = cache.insert([page], [page], priority=priority).handle
    assert cache.evict(2).tolist() == [2, 0]
    cache.extend(handle, [5], [5], priority=2**63 - 1)
    assert cache.evict(9).tolist() == [3, 1, 5, 4]


def test_core_by_name(core):
    assert RadixCache(1, core="python").core == "python"
    with pytest.raises(ValueError, match="core must be 'auto', 'native', 'python', got 'rust'"):
        RadixCache(1, core="rust")
    if core == "python":
        with pytest.raises(BackendUnavailableError, match="core 'native' cannot load: PAGEDKV_NATIVE is 0"):
            RadixCache(1, core="native")


def test_handle_of_a_place_that_others_took_is_refused():
    """The number of a node is used again; an old handle of it means nothing."""
    cache = RadixCache(1)
    old = cache.insert([1], [0]).handle
    cache.evict(1)
    for number in range(5):
        cache.lock(cache.insert([number + 2], [number]).handle)
    for call in (cache.lock, cache.unlock, lambda handle: cache.extend(handle, [1], [9])):
        with pytest.raises(ValueError, match="handle must"):
            call(old)
    assert cache.num_evictable_pages == 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_cache_is_not_copied(duplicate):
    with pytest.raises(TypeError, match="a RadixCache must not be copied or pickled"):
        duplicate(RadixCache(1))


def test_what_an_insert_refuses_leaves_no_trace():
    """Neither a split nor a use of what it would have followed."""
    cache = RadixCache(1)
    cache.insert([1, 2, 3], [0, 1, 2])
    cache.insert([4], [3])
    before = [(node.pages.tolist(), node.last_access) for node in cache.nodes()]
    with pytest.raises(ValueError, match="pages must not be in the cache yet, got page 3"):
        cache.insert([1, 2, 9], [7, 8, 3])
    with pytest.raises(ValueError, match="pages must not be in the cache yet, got page 3"):
        cache.insert([5], [3], "unknown")
    assert before == [(node.pages.tolist(), node.last_access) for node in cache.nodes()]
    assert cache.evict(3).tolist() == [0, 1, 2]
