"""Handles of a RadixCache: what is locked stays valid whatever comes behind it, and what nobody gave is refused."""

import random

import numpy as np
import pytest

from pagedkv import RadixCache
from pagedkv.management.prefix_cache import EMPTY_HANDLE, CacheHandle

pytestmark = pytest.mark.parametrize("core", ["python", pytest.param("native", marks=pytest.mark.native)])


def locked(core, page_size=1, num_pages=3):
    """A cache of one run, and its handle, locked."""
    cache = RadixCache(page_size, core=core)
    handle = cache.insert(range(num_pages * page_size), range(num_pages)).handle
    cache.lock(handle)
    return cache, handle


def tokens_of(cache, handle):
    return cache.locked_tokens(handle, 0).tolist()


def test_a_lock_outlives_the_growth_of_its_run_by_another(core):
    """The other one found the prefix by a match, did not lock it, and made the leaf longer."""
    cache, handle = locked(core)
    longer = cache.extend(cache.match([0, 1, 2]).handle, [3, 4], [3, 4]).handle
    assert (tokens_of(cache, handle), tokens_of(cache, longer)) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert cache.locked_tokens(handle, 1).tolist() == [1, 2]
    assert tokens_of(cache, cache.ancestor(handle, 2)) == [0, 1]
    assert tokens_of(cache, cache.ancestor(handle, 3)) == [0, 1, 2]
    cache.unlock(handle)
    assert cache.num_evictable_pages == 5
    with pytest.raises(ValueError, match="handle must be locked"):
        cache.unlock(handle)
    cache.sanity_check()


@pytest.mark.parametrize(
    "more, num_cached, found",
    [
        ([], 0, [0, 1, 2]),
        ([9], 0, [0, 1, 2, 9]),
        ([3], 1, [0, 1, 2, 3]),
        ([3, 9], 1, [0, 1, 2, 3, 9]),
        ([3, 4], 2, [0, 1, 2, 3, 4]),
        ([3, 4, 5], 2, [0, 1, 2, 3, 4, 5]),
        ([3, 4, 5, 6], 2, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_extending_a_handle_that_ends_inside_its_node(core, more, num_cached, found):
    cache, handle = locked(core)
    cache.extend(handle, [3, 4], [3, 4])
    result = cache.extend(handle, more, range(10, 10 + len(more)))
    assert result.num_cached == num_cached
    assert tokens_of(cache, result.handle) == found
    assert cache.match(found).num_tokens == len(found)
    assert (tokens_of(cache, handle), cache.num_cached_pages) == ([0, 1, 2], 5 + len(more) - num_cached)
    cache.sanity_check()
    cache.unlock(handle)
    assert cache.evict(99).size == 5 + len(more) - num_cached
    cache.sanity_check()


def test_only_new_behind_a_handle_that_ends_inside_its_node(core):
    cache, handle = locked(core)
    cache.extend(handle, [3, 4], [3, 4])
    result = cache.extend(handle, [3, 9], [10, 11], only_new=True)
    assert (result.num_cached, tokens_of(cache, result.handle), cache.num_cached_pages) == (1, [0, 1, 2, 3], 5)


def test_refused_pages_behind_a_handle_inside_its_node_leave_no_trace(core):
    cache, handle = locked(core)
    cache.extend(handle, [3, 4], [3, 4])
    before = [(node.pages.tolist(), node.last_access) for node in cache.nodes()]
    with pytest.raises(ValueError, match="pages must not be in the cache yet, got page 4"):
        cache.extend(handle, [3, 9], [10, 4])
    assert before == [(node.pages.tolist(), node.last_access) for node in cache.nodes()]


def test_two_handles_with_different_ends_in_one_run(core):
    """And a split between them, before them and behind them."""
    cache, short = locked(core)
    longer = cache.extend(short, [3, 4], [3, 4]).handle
    cache.lock(longer)
    for branch in ([0, 1, 2, 3, 9], [0, 9], [0, 1, 2, 9]):
        cache.insert(branch, range(10 * len(branch), 11 * len(branch)))
        assert (tokens_of(cache, short), tokens_of(cache, longer)) == ([0, 1, 2], [0, 1, 2, 3, 4])
        cache.sanity_check()
    assert tokens_of(cache, cache.extend(short, [7], [7]).handle) == [0, 1, 2, 7]
    cache.unlock(longer)
    # The lock of the shorter one covers what its run grew by, until it is taken back.
    assert cache.match([0, 1, 2]).num_tokens == 3
    cache.evict(99)
    assert tokens_of(cache, short) == [0, 1, 2]
    cache.unlock(short)
    cache.evict(99)
    assert cache.num_cached_pages == 0


def test_a_grown_run_that_is_cut_makes_its_handles_stale(core):
    cache, handle = locked(core)
    longer = cache.extend(handle, [3, 4], [3, 4]).handle
    cache.unlock(handle)
    cache.evict(1)
    for stale in (handle, longer):
        with pytest.raises(ValueError, match="handle must name a prefix that is still cached"):
            cache.lock(stale)


@pytest.mark.parametrize("page_size", [1, 2])
def test_what_is_locked_stays_valid_whatever_happens(core, page_size):
    """Random calls, extensions through handles that are not locked among them."""
    for seed in range(20):
        rng, cache, free = random.Random(seed), RadixCache(page_size, core=core), list(range(200))
        known, held = [], []
        for _ in range(150):
            ids = [rng.randrange(2) for _ in range(page_size * rng.randrange(6))]
            pages = free[: len(ids) // page_size]
            if rng.random() < 0.3:
                whole, result = ids, cache.insert(ids, pages)
            elif known and rng.random() < 0.6:
                handle, before = rng.choice(held or known)
                if rng.random() < 0.5:
                    handle = cache.match(before).handle
                before = before[: handle.num_tokens]
                if not before:
                    continue
                whole, result = before + ids, cache.extend(handle, ids, pages)
            else:
                result = cache.match(ids)
                whole = ids[: result.num_tokens]
            known = [(result.handle, whole)] if whole else []
            taken = cache.holds(np.array(pages, np.int64))
            free = [page for page in free if page not in set(np.array(pages, int)[taken].tolist())]
            if whole and len(held) < 6 and rng.random() < 0.5:
                cache.lock(result.handle)
                held.append((result.handle, whole))
            if held and rng.random() < 0.3:
                cache.unlock(held.pop(rng.randrange(len(held)))[0])
            if rng.random() < 0.3:
                free += cache.evict(rng.randrange(9)).tolist()
                known = []
            for handle, tokens in held:
                assert tokens_of(cache, handle) == tokens
                assert tokens_of(cache, cache.ancestor(handle, page_size)) == tokens[:page_size]
            cache.sanity_check()
        for handle, _ in held:
            cache.unlock(handle)
        assert cache.num_evictable_pages == cache.num_cached_pages


CALLS = [
    lambda cache, handle: cache.lock(handle),
    lambda cache, handle: cache.unlock(handle),
    lambda cache, handle: cache.extend(handle, [9] * cache.page_size, [99]),
    lambda cache, handle: cache.ancestor(handle, cache.page_size),
    lambda cache, handle: cache.locked_tokens(handle, 0),
]


@pytest.mark.parametrize(
    "forge",
    [
        lambda it: None,
        lambda it: tuple(it),
        lambda it: it._replace(node=None),
        lambda it: it._replace(node="a"),
        lambda it: it._replace(node=-1),
        lambda it: it._replace(node=2**31),
        lambda it: it._replace(node=2**70),
        lambda it: it._replace(node=-(2**70)),
        lambda it: it._replace(node=0.0),
        lambda it: it._replace(node=True),
        lambda it: it._replace(version=None),
        lambda it: it._replace(version=0),
        lambda it: it._replace(version=it.version - 1),
        lambda it: it._replace(version=it.version + 1),
        lambda it: it._replace(version=2**80),
        lambda it: it._replace(version=1.5),
        lambda it: it._replace(num_tokens=None),
        lambda it: it._replace(num_tokens=-1),
        lambda it: it._replace(num_tokens=4),
        lambda it: it._replace(num_tokens=2**62),
        lambda it: it._replace(num_tokens=2**63),
        lambda it: it._replace(num_tokens=-(2**63)),
        lambda it: it._replace(num_tokens=2.0),
        lambda it: CacheHandle(None, None, 1),
    ],
)
@pytest.mark.parametrize("call", CALLS, ids=["lock", "unlock", "extend", "ancestor", "locked_tokens"])
def test_forged_handles_are_refused(core, call, forge):
    cache, handle = locked(core)
    with pytest.raises((ValueError, TypeError), match="handle must "):
        call(cache, forge(handle))
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (3, 0)
    cache.sanity_check()
    cache.unlock(handle)


@pytest.mark.parametrize("call", CALLS, ids=["lock", "unlock", "extend", "ancestor", "locked_tokens"])
def test_handles_of_elsewhere_are_refused(core, call):
    cache, handle = locked(core)
    other, foreign = locked(core)
    with pytest.raises(ValueError, match="handle must be one of this cache, got one of 3 tokens of another"):
        call(cache, foreign)
    other.unlock(foreign)
    cache.reset(force=True)
    cache.insert([0, 1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="handle must (be locked|name a prefix that is still cached)"):
        call(cache, handle)
    assert (cache.num_cached_pages, cache.num_evictable_pages) == (3, 3)
    cache.sanity_check()


def test_a_handle_of_any_numbers_harms_nothing(core):
    """Each is refused, or names whole pages of what is cached."""
    rng = random.Random(0)
    cache = RadixCache(2, core=core)
    kept = cache.insert(range(8), range(4)).handle
    cache.lock(kept)
    cache.insert([0, 1, 5, 5], [0, 9])
    real = [kept, *(cache.match(range(length)).handle for length in (2, 4, 8))]
    num_refused = 0
    for _ in range(3000):
        one, other = rng.choice(real), rng.choice(real)
        num_tokens = rng.choice([rng.randrange(-4, 12), 2 ** rng.randrange(66), one.num_tokens])
        node = rng.randrange(-70, 70) if core == "native" and rng.random() < 0.5 else other.node
        handle = CacheHandle(node, one.version + rng.choice([0, 0, 1]), num_tokens)
        if num_tokens == 0:
            continue
        try:
            tokens = tokens_of(cache, handle)
        except ValueError:
            num_refused += 1
            for call in CALLS:
                with pytest.raises(ValueError, match="handle must |num_tokens must be whole pages of 2 and at most"):
                    call(cache, handle)
        else:
            assert tokens == [0, 1, 2, 3, 4, 5, 6, 7][:num_tokens] or tokens == [0, 1, 5, 5][:num_tokens]
            cache.lock(handle)
            cache.unlock(handle)
    assert 1000 < num_refused < 3000
    cache.sanity_check()


def test_a_forced_reset_drops_locks_too(core, monkeypatch):
    cache, handle = locked(core)
    monkeypatch.setenv("PAGEDKV_NATIVE", "0")
    cache.insert([5], [5], "other")
    with pytest.raises(ValueError, match="the cache must not be locked to be reset, got 3 locked pages"):
        cache.reset()
    assert cache.reset(force=True).tolist() == [0, 1, 2, 5]
    assert (cache.num_cached_pages, cache.num_evictable_pages, list(cache.nodes())) == (0, 0, [])
    assert cache.match([5], "other").num_tokens == cache.match([0, 1]).num_tokens == 0
    with pytest.raises(ValueError, match="handle must be locked, got one of 3 tokens that is not"):
        cache.unlock(handle)
    cache.unlock(EMPTY_HANDLE)
    again = cache.insert([0, 1, 2], [0, 1, 2]).handle
    cache.lock(again)
    for call in (cache.lock, lambda it: cache.extend(it, [3], [3]), lambda it: cache.ancestor(it, 1)):
        with pytest.raises(ValueError, match="handle must name a prefix that is still cached, got one of 3 tokens"):
            call(handle)
    cache.sanity_check()
    assert cache.reset(force=True).tolist() == [0, 1, 2]
    assert cache.reset().tolist() == []
    assert cache.core == core
