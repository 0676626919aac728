"""A hashed cache with a window: pages of 2 tokens and a window of 5, so that a prefix needs its last two pages."""

import gc
import weakref

import numpy as np
import pytest

from pagedkv import IntegrityError
from pagedkv.management.events import BlockRemoved, BlockStored
from pagedkv.management.hashed_cache import HashedPageCache
from pagedkv.management.page_hash import digest_pages, namespace_digest, sha256, short_hash
from pagedkv.testing.prefix_cache_suite import prefix_cache_cases


def ids(word):
    """Two tokens a letter."""
    return [token for letter in word for token in (ord(letter), 1)]


def windowed(**options):
    return HashedPageCache(2, **{"window": 5, **options})


def filled(**options):
    """ "abcdef" on pages 10..15."""
    cache = windowed(**options)
    cache.insert(ids("abcdef"), range_of(10, 16))
    return cache


def range_of(start, stop):
    return list(range(start, stop))


def found(cache, word, namespace=None):
    return cache.match(ids(word), namespace).pages.tolist()


def num_known(cache):
    """Positions that the cache knows, ghosts included."""
    return len(list(cache._table.pages()))


def leave(cache, *pages):
    """These pages leave, and no others."""
    for page in pages:
        cache._queue._withdraw(cache._by_page[page])
        cache._leave(cache._by_page[page])
    cache.sanity_check()


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 16, 17, 18, 33, 1000])
def test_a_prefix_needs_the_pages_of_its_last_tokens(page_size, window):
    cache = HashedPageCache(page_size, window=window)
    cache.insert(np.arange(8 * page_size), np.arange(8))
    for num_tokens in range(0, 8 * page_size + 1, page_size):
        num_pages = num_tokens // page_size
        start = min(num_pages, max(0, num_tokens - window + 1) // page_size)
        result = cache.match(np.arange(num_tokens))
        assert result.pages.tolist() == [-1] * start + range_of(start, num_pages)
        cache.lock(result.handle)
        assert cache.num_evictable_pages == 8 - num_pages + start
        cache.unlock(result.handle)


def test_a_prefix_is_found_by_its_end():
    cache = filled()
    leave(cache, 10, 11, 12, 13)
    assert found(cache, "abcdef") == [-1, -1, -1, -1, 14, 15]
    assert found(cache, "abcdefg") == [-1, -1, -1, -1, 14, 15]
    # The prefix of five pages needs the fourth, which has left.
    assert found(cache, "abcde") == []
    assert found(cache, "abcdeg") == []
    # The same last pages behind others are not this prefix.
    assert found(cache, "xbcdef") == []
    assert found(cache, "abcdef", "other") == []


def test_the_longest_whole_prefix_is_found_around_what_is_missing():
    cache = filled()
    leave(cache, 14)
    assert found(cache, "abcdef") == [-1, -1, 12, 13]
    leave(cache, 12)
    assert found(cache, "abcdef") == [10, 11]
    leave(cache, 10)
    assert found(cache, "abcdef") == []
    assert cache.num_cached_pages == 3


def test_a_lock_protects_the_last_pages_alone():
    cache = filled()
    handle = cache.match(ids("abcdef")).handle
    cache.lock(handle)
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (6, 4)
    assert cache.evict(1).tolist() == [13]
    assert cache.evict(9).tolist() == [10, 11, 12]
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (2, 0)
    assert cache.locked_tokens(handle, 0).tolist() == ids("abcdef")
    assert cache.locked_tokens(handle, 5).tolist() == ids("abcdef")[5:]
    cache.sanity_check()
    cache.unlock(handle)
    assert cache.evict(9).tolist() == [14, 15]
    assert num_known(cache) == 0


def test_locks_are_counts_and_overlap():
    cache = filled()
    handles = [cache.match(ids(word)).handle for word in ("abc", "abcd", "abcd", "abcdef")]
    evictable = []
    for handle in handles:
        cache.lock(handle)
        evictable.append(cache.num_evictable_pages)
    # b c, then b c d twice, then all but the first.
    assert evictable == [4, 3, 3, 1]
    for handle in handles:
        cache.unlock(handle)
        cache.sanity_check()
        evictable.append(cache.num_evictable_pages)
    # b goes; c d stay under the second; then e f alone are locked; then nothing.
    assert evictable[4:] == [2, 2, 4, 6]
    with pytest.raises(ValueError, match="handle must be locked, got one of 6 tokens that is not"):
        cache.unlock(handles[0])


def test_a_running_sequence_leaves_pages_behind_that_go_first():
    cache = windowed()
    other = cache.insert(ids("xy"), [50, 51]).handle
    handle = cache.insert(ids("ab"), [0, 1]).handle
    cache.lock(handle)
    for page, letter in enumerate("cdefgh", 2):
        longer = cache.extend(handle, ids(letter), [page], only_new=True).handle
        cache.lock(longer)
        cache.unlock(handle)
        handle = longer
        cache.sanity_check()
        assert (cache.num_cached_pages, cache.num_evictable_pages) == (page + 3, page + 1)
    cache.match(ids("xy"))
    assert cache.locked_tokens(handle, 0).tolist() == ids("abcdefgh")
    assert cache.evict(4).tolist() == [3, 2, 1, 0]
    cache.unlock(handle)
    # Left behind, then used by the other prompt, then by the sequence when it ended; of one use the last page first.
    assert cache.evict(5).tolist() == [7, 50, 51, 5, 4]
    assert found(cache, "abcdefgh") == []
    cache.sanity_check()
    with pytest.raises(ValueError, match="handle must name a prefix that is still cached, got one of 4 tokens"):
        cache.lock(other)


def test_forks_that_go_different_ways_keep_what_they_share():
    cache = windowed()
    shared = cache.insert(ids("abc"), [0, 1, 2]).handle
    cache.lock(shared)
    cache.lock(shared)
    one, two = (cache.extend(shared, ids(word), pages).handle for word, pages in (("de", [3, 4]), ("xyz", [5, 6, 7])))
    cache.lock(one)
    cache.unlock(shared)
    cache.sanity_check()
    assert cache.num_evictable_pages == 8 - 4
    cache.lock(two)
    cache.unlock(shared)
    cache.sanity_check()
    assert sorted(cache.evict(9).tolist()) == [0, 1, 2, 5]
    assert found(cache, "abcxyz") == [-1, -1, -1, -1, 6, 7]
    assert found(cache, "abcde") == [-1, -1, -1, 3, 4]


def test_a_lock_moves_on_in_steps_that_do_not_grow_with_the_window():
    """The page in the middle of the window cannot be walked over, and nothing needs to."""
    cache = HashedPageCache(1, window=2000)
    handle = cache.insert(np.arange(3000), np.arange(3000)).handle
    cache.lock(handle)
    middle = cache._by_page[2500]
    before, middle.parent = middle.parent, None
    for number in range(10):
        longer = cache.extend(handle, [number], [5000 + number], only_new=True).handle
        cache.lock(longer)
        cache.unlock(handle)
        handle = longer
    middle.parent = before
    assert cache.num_evictable_pages == 3010 - 1999
    cache.sanity_check()


def test_insert_fills_what_is_missing_up_to_the_next_page_that_is_there():
    cache = filled()
    leave(cache, 12, 13)
    result = cache.insert(ids("abcdef"), range_of(20, 26))
    assert (result.num_cached, result.handle.num_tokens) == (4, 8)
    assert cache.holds(np.arange(20, 26)).tolist() == [False, False, True, True, False, False]
    assert found(cache, "abcdef") == [-1, -1, -1, -1, 14, 15]
    assert found(cache, "abcd") == [-1, -1, 22, 23]
    leave(cache, 10)
    result = cache.insert(ids("abcdef"), range_of(30, 36), only_new=True)
    assert (result.num_cached, result.handle.num_tokens) == (0, 2)
    assert found(cache, "ab") == [30, 11]
    cache.sanity_check()


def test_only_new_takes_nothing_when_the_first_position_has_a_page():
    cache = filled()
    leave(cache, 11)
    result = cache.insert(ids("abcdefg"), range_of(20, 27), only_new=True)
    assert (result.num_cached, result.handle.num_tokens) == (2, 2)
    handle = cache.match(ids("abcd")).handle
    result = cache.extend(handle, ids("efg"), range_of(20, 23), only_new=True)
    assert (result.num_cached, result.handle.num_tokens) == (4, 12)
    assert not cache.holds(np.arange(20, 27)).any()


def test_extend_takes_what_is_behind_and_stops_at_what_is_there():
    cache = windowed()
    cache.insert(ids("abcdefgh"), range_of(0, 8))
    handle = cache.match(ids("ab")).handle
    cache.lock(handle)
    leave(cache, 2, 4, 5)
    result = cache.extend(handle, ids("cdefgh"), range_of(20, 26))
    assert (result.num_cached, result.handle.num_tokens) == (0, 6)
    cache.lock(result.handle)
    result = cache.extend(result.handle, ids("defgh"), range_of(30, 35))
    assert (result.num_cached, result.handle.num_tokens) == (2, 12)
    assert found(cache, "abcdefgh") == [-1] * 6 + [6, 7]
    assert found(cache, "abcdef") == [-1] * 4 + [31, 32]
    empty = cache.extend(result.handle, [], [])
    assert (empty.num_cached, empty.handle.num_tokens) == (0, 12)


def test_insert_of_pages_that_the_window_has_given_back():
    cache = windowed()
    result = cache.insert(ids("abcd"), [-1, -1, 2, 3])
    assert (result.num_cached, result.handle.num_tokens) == (0, 8)
    assert (cache.num_cached_pages, num_known(cache)) == (2, 4)
    assert found(cache, "abcd") == [-1, -1, 2, 3]
    assert found(cache, "abc") == []
    result = cache.insert(ids("abcdef"), [-1, -1, -1, 9, 4, 5])
    # The first position behind those given back has a page.
    assert (result.num_cached, result.handle) == (0, windowed().match([]).handle)
    handle = cache.match(ids("abcd")).handle
    result = cache.extend(handle, ids("efgh"), [-1, -1, 6, 7])
    assert (result.num_cached, result.handle.num_tokens) == (0, 16)
    assert found(cache, "abcdefgh") == [-1] * 6 + [6, 7]
    result = cache.insert(ids("abcdxyz"), [-1, -1, -1, -1, 10, 11, 12])
    assert (result.num_cached, result.handle.num_tokens) == (0, 14)
    cache.sanity_check()


def test_nothing_is_taken_that_completes_no_prefix():
    cache = windowed()
    cache.insert(ids("abcdef"), [-1, -1, -1, -1, 4, 5])
    # Page 3 alone would stand between a ghost and page 4: the prefix up to it needs both of its last pages.
    result = cache.insert(ids("abcdef"), [-1, -1, -1, 13, 14, 15])
    assert (result.num_cached, result.handle.num_tokens, cache.num_cached_pages) == (0, 0, 2)
    result = cache.insert(ids("abcdef"), [-1, -1, 12, 13, 14, 15])
    assert (result.num_cached, result.handle.num_tokens, cache.num_cached_pages) == (0, 8, 4)
    cache.sanity_check()


@pytest.mark.parametrize(
    "pages, words",
    [
        ([0, -1, 2, 3], r"pages must be in 0..2\*\*31 - 2, or -1 before all others, got -1..3 behind 0 of -1"),
        ([-1, 1, -1, 3], "got -1..3 behind 1 of -1"),
        ([-2, 1, 2, 3], "got -2..3 behind 0 of -1"),
        ([-1, 1, 2, 2**31 - 1], "got 1..2147483647 behind 1 of -1"),
        ([-1, 1, 2, 2], "pages must name each page once, got page 2 twice"),
        ([-1, 1, 2, 14], "pages must not be in the cache yet, got page 14"),
        ([-1, 1, 2], r"pages must have shape \[4\] for 8 tokens"),
    ],
)  # fmt: skip
def test_wrong_pages_are_refused_and_nothing_has_changed(pages, words):
    cache = filled()
    handle = cache.match(ids("abcdef")).handle
    with pytest.raises(ValueError, match=words):
        cache.insert(ids("wxyz"), pages)
    with pytest.raises(ValueError, match=words):
        cache.extend(handle, ids("wxyz"), pages)
    assert (cache.num_cached_pages, num_known(cache), len(cache._roots)) == (6, 6, 1)
    cache.sanity_check()


def test_pages_that_are_not_given_must_be_there_where_they_are_needed():
    cache = filled()
    for pages in ([-1, -1, -1, 3], [-1, -1, -1, -1], [-1]):
        result = cache.insert(ids("wxyz")[: 2 * len(pages)], pages)
        assert (result.num_cached, result.handle.num_tokens, cache.num_cached_pages) == (0, 0, 6)
    result = cache.insert(ids("abcdefgh"), [-1, -1, -1, -1, -1, -1, 6, 7])
    assert (result.num_cached, result.handle.num_tokens) == (12, 16)
    assert found(cache, "abcdefgh") == [-1] * 6 + [6, 7]
    cache.sanity_check()


def test_only_new_looks_at_the_first_page_that_is_given():
    cache = filled()
    leave(cache, 14)
    result = cache.insert(ids("abcdef"), [-1, -1, -1, -1, 24, 25], only_new=True)
    assert cache.holds(np.array([24, 25])).tolist() == [True, False]
    assert result.handle.num_tokens == 10
    result = cache.insert(ids("abcdef"), [-1, -1, -1, 33, 34, 35], only_new=True)
    assert not cache.holds(np.array([33, 34, 35])).any()
    cache.sanity_check()


def test_ancestor_is_refused_when_a_page_that_it_needs_has_left():
    cache = filled()
    handle = cache.match(ids("abcdef")).handle
    cache.lock(handle)
    leave(cache, 12)
    short = cache.ancestor(handle, 4)
    cache.lock(short)
    assert cache.num_evictable_pages == 1
    for num_tokens in (6, 8):
        with pytest.raises(ValueError, match=f"num_tokens must be a prefix whose last 2 pages.* got {num_tokens}"):
            cache.ancestor(handle, num_tokens)
    with pytest.raises(ValueError, match="num_tokens must be whole pages of 2 and at most 12, got 3"):
        cache.ancestor(handle, 3)
    assert cache.ancestor(handle, 0).num_tokens == 0
    assert cache.ancestor(handle, 0).node is None
    # A page that came back is another page than the one that the handle was given with.
    assert cache.insert(ids("abc"), [0, 0, 22]).num_cached == 4
    with pytest.raises(ValueError, match="num_tokens must be a prefix whose last 2 pages.* got 6"):
        cache.ancestor(handle, 6)
    assert cache.ancestor(cache.match(ids("abcdef")).handle, 6).num_tokens == 6


def test_a_handle_whose_page_left_and_came_back_is_refused():
    cache = filled()
    handle = cache.match(ids("abcd")).handle
    leave(cache, 10, 11)
    assert cache.extend(handle, [], []).handle.num_tokens == 8
    leave(cache, 12)
    words = "handle must name a prefix that is still cached, got one of 8 tokens that changed"
    for back in (False, True):
        if back:
            cache.insert(ids("abcd"), [-1, 21, 22, 23])
        for use in (cache.lock, lambda one: cache.extend(one, [], []), lambda one: cache.ancestor(one, 2)):
            with pytest.raises(ValueError, match=words):
                use(handle)
    # Another handle's lock does not make it current.
    cache.insert(ids("abc"), [20, 21, 22])
    again = cache.match(ids("abcd"))
    assert again.pages.tolist() == [-1, -1, 22, 13]
    cache.lock(again.handle)
    with pytest.raises(ValueError, match=words):
        cache.lock(handle)
    with pytest.raises(ValueError, match="handle must be one of this cache"):
        windowed().lock(handle)


def test_ghosts_stay_as_long_as_a_page_continues_them():
    cache = windowed()
    empty = cache.num_bytes
    cache.insert(ids("abcdef"), range_of(0, 6))
    cache.insert(ids("abxy"), [0, 0, 8, 9])
    full = cache.num_bytes
    leave(cache, 0, 1, 2, 3, 4)
    assert (cache.num_cached_pages, num_known(cache)) == (3, 8)
    assert empty < cache.num_bytes <= full
    leave(cache, 5)
    assert (cache.num_cached_pages, num_known(cache)) == (2, 4)
    leave(cache, 8)
    assert num_known(cache) == 4
    leave(cache, 9)
    assert (num_known(cache), len(cache._roots), cache.num_cached_pages) == (0, 0, 0)
    cache.insert(ids("abcdef"), range_of(0, 6))
    cache.reset()
    assert (num_known(cache), cache.num_bytes) == (0, empty)


@pytest.mark.parametrize(
    "eviction, order",
    [
        ("lru", [11, 10, 13, 12, 21, 20, 15, 14]),
        ("fifo", [15, 14, 13, 12, 11, 10, 21, 20]),
        ("mru", [15, 14, 21, 20, 13, 12, 11, 10]),
        ("lfu", [11, 10, 21, 20, 13, 12, 15, 14]),
        ("priority", [11, 10, 13, 12, 15, 14, 21, 20]),
    ],
)
def test_each_page_goes_by_its_own_uses_and_of_equals_the_last(eviction, order):
    cache = filled(eviction=eviction)
    cache.match(ids("abcd"))
    cache.insert(ids("xy"), [20, 21], priority=1)
    for _ in range(2):
        cache.match(ids("abcdef"))
    dropped = []
    for _ in range(8):
        dropped += cache.evict(1).tolist()
        cache.sanity_check()
    assert dropped == order


def test_a_page_that_comes_back_has_no_uses_yet():
    cache = filled(eviction="lfu")
    for _ in range(2):
        cache.match(ids("abcdef"))
    leave(cache, 14)
    assert cache.insert(ids("abcdef"), range_of(20, 26)).num_cached == 8
    cache.match(ids("abcd"))
    assert cache.evict(3).tolist() == [24, 10, 11]


def test_the_priority_of_locked_pages_rises_too():
    cache = filled(eviction="priority")
    handle = cache.match(ids("abcdef")).handle
    cache.lock(handle)
    cache.extend(handle, ids("g"), [16], priority=5)
    cache.unlock(handle)
    assert sorted(cache.evict(5).tolist()) == range_of(10, 15)


def test_what_waits_for_the_queue_is_bounded():
    cache = HashedPageCache(1, window=3)
    cache.insert(np.arange(1000), np.arange(1000))
    assert (len(cache._to_offer), len(cache._queue)) == (1000, 0)
    cache.insert(np.arange(1000, 1100), np.arange(1000, 1100))
    assert (len(cache._to_offer), len(cache._queue)) == (0, 1100)
    cache.insert([5], [1100])
    cache.evict(0)
    assert (len(cache._to_offer), len(cache._queue)) == (0, 1101)
    cache.sanity_check()


def test_a_policy_of_a_user_is_asked_again_after_a_use():
    class Odd:
        def priority(self, run):
            return (-run.num_hits, run.priority)

    cache = filled(eviction=Odd())
    assert isinstance(cache.eviction_policy, Odd)
    cache.match(ids("abcd"))
    assert cache.evict(1).tolist() == [13]
    cache.match(ids("abcdef"))
    assert cache.evict(1).tolist() == [15]
    cache.insert(ids("ab"), [0, 1], priority=3)
    assert cache.evict(5).tolist() == [10, 11, 12, 14]


@pytest.mark.parametrize("page_hash", [sha256, lambda data: b"same"])
def test_events_name_the_page_before_even_when_it_has_left(page_hash):
    cache = windowed(events=True, page_hash=page_hash)
    cache.insert(ids("abcdef"), range_of(10, 16), "n")
    hashes = tuple(map(short_hash, digest_pages(namespace_digest("n"), np.array(ids("abcdef")), 2)))
    (first,) = cache.events.take()
    assert (first.block_hashes, first.parent_block_hash) == (hashes, None)
    cache.lock(cache.match(ids("abcdef"), "n").handle)
    assert cache.evict(9).tolist() == [10, 11, 12, 13]
    assert cache.events.take() == [BlockRemoved(hashes[:4])]
    # The beginning is not there, then it is.
    cache.insert(ids("abcd"), [-1, -1, 22, 23], "n")
    keys = (("n",), ("n",))
    behind = BlockStored(hashes[2:4], hashes[1], tuple(ids("cd")), 2, extra_keys=keys)
    assert cache.events.take() == [behind]
    assert cache.evict(2).tolist() == [22, 23]
    cache.insert(ids("ab"), [20, 21], "n")
    cache.insert(ids("abcd"), range_of(30, 34), "n")
    removed, stored, again = cache.events.take()
    assert removed == BlockRemoved(hashes[2:4])
    assert (stored.block_hashes, stored.parent_block_hash, again) == (hashes[:2], None, behind)
    assert cache.events.num_pages == 6
    cache.sanity_check()


def test_nodes_are_runs_without_ghosts():
    cache = filled()
    cache.insert(ids("abcdxy"), [0, 0, 0, 0, 20, 21])
    handle = cache.match(ids("abcdef")).handle
    cache.lock(handle)
    cache.lock(cache.match(ids("abcde")).handle)
    leave(cache, 11, 12)
    runs = list(cache.nodes())
    assert [(run.pages.tolist(), run.num_missing, run.locks, run.anchors) for run in runs] == [
        ([], 0, 0, 0),
        ([10], 0, 0, 0),
        ([13], 2, 1, 0),
        ([14], 0, 2, 1),
        ([20, 21], 0, 0, 0),
        ([15], 0, 1, 1),
    ]
    assert [runs.index(run.parent) for run in runs[1:]] == [0, 1, 2, 2, 3]
    assert [run.num_pages for run in runs[2].children] == [1, 2]
    assert runs[4].tokens.tolist() == ids("xy")
    assert [run.is_evictable for run in runs] == [False, True, False, False, True, False]
    assert [run.num_hits for run in runs] == [0, 0, 1, 2, 0, 1]


def test_a_window_of_one_token_needs_nothing():
    cache = HashedPageCache(2, window=1, events=True)
    empty = cache.match([*ids("abc"), 7])
    assert (empty.num_tokens, empty.pages.tolist(), num_known(cache)) == (6, [-1, -1, -1], 0)
    cache.lock(empty.handle)
    assert cache.locked_tokens(empty.handle, 2).tolist() == ids("bc")
    result = cache.extend(empty.handle, ids("de"), [4, 5])
    assert (result.num_cached, result.handle.num_tokens) == (0, 10)
    assert (cache.num_cached_pages, cache.num_evictable_pages, num_known(cache)) == (2, 2, 5)
    cache.sanity_check()
    with pytest.raises(ValueError, match="pages must not be in the cache yet, got page 4"):
        cache.extend(cache.match(ids("xyz"), "other").handle, ids("d"), [4])
    assert (num_known(cache), len(cache._roots)) == (5, 1)
    assert cache.evict(9).tolist() == [4, 5]
    assert (num_known(cache), len(cache._roots)) == (0, 0)
    assert cache.locked_tokens(cache.ancestor(result.handle, 8), 0).tolist() == ids("abcd")
    assert cache.insert(ids("ab"), [-1, -1]).handle.num_tokens == 0
    cache.unlock(empty.handle)
    with pytest.raises(ValueError, match="handle must be locked"):
        cache.unlock(empty.handle)
    cache.sanity_check()


def test_window_is_told_and_checked():
    cache = filled()
    assert (cache.window, HashedPageCache(2).window) == (5, None)
    with pytest.raises(AttributeError):
        cache.window = 7
    assert "window=5, num_cached_pages=6" in repr(cache)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        HashedPageCache(2, window=0)
    with pytest.raises(TypeError, match="window must be an int, got float"):
        HashedPageCache(2, window=5.0)


def test_reset_needs_no_locks():
    cache = filled()
    handle = cache.match(ids("abcdef")).handle
    cache.lock(handle)
    with pytest.raises(ValueError, match="the cache must not be locked to be reset, got 2 locked pages"):
        cache.reset()
    cache.unlock(handle)
    assert sorted(cache.reset().tolist()) == range_of(10, 16)
    assert (num_known(cache), cache._to_offer) == (0, [])
    with pytest.raises(ValueError, match="handle must name a prefix that is still cached"):
        cache.lock(handle)
    cache.insert(ids("abcdef"), range_of(10, 16))
    assert cache.evict(9).tolist() == [14, 15, 10, 11, 12, 13]
    cache.sanity_check()


@pytest.mark.parametrize("drop", ["forget", "reset", "evict"])
def test_pages_of_a_long_prompt_are_freed_without_recursion(drop):
    cache = HashedPageCache(1, window=9)
    handle = cache.insert(np.arange(30_000), np.arange(30_000)).handle
    last = weakref.ref(cache._queue)
    if drop != "forget":
        getattr(cache, drop)(*([30_000] if drop == "evict" else []))
        assert num_known(cache) == 0
    del cache, handle
    gc.collect()
    assert last() is None


# A page is evicted for its own uses alone, so not always from the end; and -1 is refused in other words.
NOT_OF_A_WINDOW = {
    "wrong-pages-are-refused", "what-is-left-is-always-a-prefix", "random-calls-fifo", "random-calls-mru",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in prefix_cache_cases([1, 2]) if case.situation not in NOT_OF_A_WINDOW], ids=str
)
def test_a_window_wider_than_every_prompt_changes_no_result(case):
    case(lambda page_size, *args, **options: HashedPageCache(page_size, *args, window=10**6, **options))


class ForgetsNoGhosts(HashedPageCache):
    def _forget(self, page):
        pass


class LocksOnePageLess(HashedPageCache):
    def _lock_in_window(self, page):
        super()._lock_in_window(page)
        page.span.pages[0].locks -= 1


class LocksOnePageMore(HashedPageCache):
    def _lock_in_window(self, page):
        super()._lock_in_window(page)
        page.span.pages[0].parent.locks += 1
        self._num_locked_pages += 1


class CountsNoUnlock(HashedPageCache):
    def _unlock_in_window(self, page):
        counted = self._num_locked_pages
        super()._unlock_in_window(page)
        self._num_locked_pages = counted


class EvictsWhatIsNeeded(HashedPageCache):
    def evict(self, num_pages):
        page = next(page for page in self._by_page.values() if page.locks)
        self._leave(page)


class ForgetsGhostsTooEarly(HashedPageCache):
    def _leave(self, page):
        super()._leave(page)
        if page.num_children:
            self._table.remove(page)


class OffersNothing(HashedPageCache):
    def _offer_later(self, pages):
        pass


class KeepsTheEnd(HashedPageCache):
    def _unlock_in_window(self, page):
        span = page.span
        super()._unlock_in_window(page)
        page.span = span


class MovesTheLockTooFar(HashedPageCache):
    def _unlock_in_window(self, page):
        window_pages, self._window_pages = self._window_pages, self._window_pages - 1
        super()._unlock_in_window(page)
        self._window_pages = window_pages


class KeepsTheNumber(HashedPageCache):
    def _leave(self, page):
        super()._leave(page)
        self._by_page[99] = page


class MisplacesWhatIsBehind(HashedPageCache):
    def _ghosts(self, before, ids, **options):
        chain = super()._ghosts(before, ids, **options)
        chain[-1].position += 1
        return chain


def live(cache):
    """Fills a cache, moves a lock on over it, evicts, unlocks and evicts; proves it after every step."""
    cache.insert(ids("abcdef"), range_of(10, 16))
    cache.sanity_check()
    handle = cache.match(ids("abcdef")).handle
    cache.lock(handle)
    cache.sanity_check()
    longer = cache.extend(handle, ids("g"), [16]).handle
    cache.lock(longer)
    cache.sanity_check()
    cache.unlock(handle)
    cache.sanity_check()
    cache.evict(2)
    cache.sanity_check()
    cache.unlock(longer)
    cache.sanity_check()
    cache.evict(9)
    cache.sanity_check()


@pytest.mark.parametrize(
    "planted, evidence",
    [
        (ForgetsNoGhosts, "has nothing behind it and is not forgotten"),
        (LocksOnePageLess, "page 14 counts 0 locks, 1 spans have it"),
        (LocksOnePageMore, "page 13 counts 1 locks, 0 spans have it"),
        (CountsNoUnlock, "the cache counts 3 locked pages, 2 are"),
        (EvictsWhatIsNeeded, "is locked by name and needs the ghost at position 5"),
        (ForgetsGhostsTooEarly, "counts 1 pages behind it|continues a page that is not known"),
        (OffersNothing, "is evictable and not in the eviction queue"),
        (KeepsTheEnd, "is locked by name 0 times, with the wrong span"),
        (MovesTheLockTooFar, "is locked by name and needs|a span has"),
        (KeepsTheNumber, "pages have a number"),
        (MisplacesWhatIsBehind, "is at the wrong position"),
    ],
)
def test_sanity_check_finds(planted, evidence):
    live(windowed())
    with pytest.raises(IntegrityError, match=evidence):
        live(planted(2, window=5))
