import gc
import weakref
from dataclasses import dataclass

import pytest

from pagedkv import KVCacheManager, RadixCache
from pagedkv.management.eviction import (
    EvictionQueue,
    LRUPolicy,
    eviction_policies,
    make_eviction_policy,
    register_eviction_policy,
)


@dataclass(eq=False)
class Run:
    last_access: int
    is_evictable: bool = True
    num_pages: int = 1
    created: int = 0
    num_hits: int = 0
    priority: int = 0
    queued_serial: int | None = None
    queued_priority: tuple[float, ...] = ()


class NewestFirst:
    """Its priority falls when a run is used, the opposite of LRU."""

    def priority(self, run):
        return (-run.last_access,)


def pop_all(queue):
    runs = []
    while (run := queue.pop()) is not None:
        runs.append(run.last_access)
    return runs


def test_queue_gives_the_least_priority_first():
    queue = EvictionQueue(LRUPolicy())
    for time in (5, 2, 9):
        queue.offer(Run(time))
    assert pop_all(queue) == [2, 5, 9]


def test_queue_notices_what_was_used_or_locked_since():
    queue = EvictionQueue(LRUPolicy())
    runs = [Run(1), Run(2), Run(3)]
    for run in runs:
        queue.offer(run)
    runs[0].last_access = 4
    runs[1].is_evictable = False
    assert pop_all(queue) == [3, 4]


def test_queue_takes_out_what_is_offered_locked():
    queue = EvictionQueue(LRUPolicy())
    runs = [Run(1), Run(2)]
    for run in runs:
        queue.offer(run)
    runs[0].is_evictable = False
    queue.offer(runs[0])
    assert runs[0].queued_serial is None
    assert queue.first() is runs[1]
    assert queue.first() is runs[1]
    assert pop_all(queue) == [2]


def test_queue_holds_a_run_once():
    queue = EvictionQueue(LRUPolicy())
    run = Run(1)
    for time in range(2, 50):
        queue.offer(run)
        run.last_access = time
    assert pop_all(queue) == [49]


def test_queue_stays_small_when_a_rank_goes_to_and_fro():
    queue = EvictionQueue(LRUPolicy())
    run = Run(1)
    for time in range(1000):
        run.last_access = time % 2
        queue.offer(run)
    assert len(queue) < 100
    assert pop_all(queue) == [1]


def test_a_run_keeps_its_turn_while_it_is_evictable():
    """Its rank rises and falls again; among equals it is still the first."""
    queue = EvictionQueue(LRUPolicy())
    runs = [Run(7), Run(7)]
    for run in runs:
        queue.offer(run)
    for time in (9, 7):
        runs[0].last_access = time
        queue.offer(runs[0])
    assert queue.pop() is runs[0]


def test_queue_follows_a_priority_that_falls_and_stays_small():
    queue = EvictionQueue(NewestFirst())
    old, used = Run(10), Run(1)
    queue.offer(old)
    for time in range(2, 1000):
        used.last_access = time
        queue.offer(used)
    assert len(queue) < 200
    assert pop_all(queue) == [999, 10]


def test_equal_priorities_go_in_order_of_offer():
    queue = EvictionQueue(LRUPolicy())
    runs = [Run(7, num_pages=number) for number in range(5)]
    for run in runs:
        queue.offer(run)
    assert [queue.pop() for _ in runs] == runs


def test_policies_by_name_and_by_instance(monkeypatch):
    monkeypatch.setattr("pagedkv.management.eviction._POLICIES", {"lru": LRUPolicy})
    assert eviction_policies() == ("lru",)
    register_eviction_policy("newest", NewestFirst)
    assert isinstance(make_eviction_policy("newest"), NewestFirst)
    policy = NewestFirst()
    assert make_eviction_policy(policy) is policy
    with pytest.raises(ValueError, match="name must be new, got 'lru'"):
        register_eviction_policy("lru", LRUPolicy)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="eviction must be 'fifo' or .* or 'slru' or a policy, got 'lfu2'"):
        RadixCache(4, eviction="lfu2")
    with pytest.raises(TypeError, match=r"eviction must be a name or have a method priority\(run\), got int"):
        KVCacheManager(4, page_size=1, eviction=3)


BOTH_CORES = pytest.mark.parametrize("core", ["python", pytest.param("native", marks=pytest.mark.native)])


def used(eviction, core):
    """Five prompts of one page, inserted in this order; then 1 is hit three times, 3 once, and 0 twice, also last."""
    cache = RadixCache(1, eviction, core=core)
    for prompt, priority in enumerate([0, 1, 0, 2, 0]):
        cache.insert([prompt], [prompt], priority=priority)
    for prompt in (1, 1, 1, 0, 3, 0):
        cache.match([prompt])
    return cache


ORDERS = {
    "lru": [2, 4, 1, 3, 0],
    "lfu": [2, 4, 3, 0, 1],
    "fifo": [0, 1, 2, 3, 4],
    "mru": [0, 3, 1, 4, 2],
    "filo": [4, 3, 2, 1, 0],
    "slru": [2, 4, 1, 3, 0],
    "priority": [2, 4, 0, 1, 3],
}


@BOTH_CORES
@pytest.mark.parametrize("eviction", eviction_policies())
def test_order_of_each_policy(eviction, core):
    cache = used(eviction, core)
    assert repr(cache.eviction_policy).lower() == f"{eviction}policy()"
    assert [cache.evict(1).tolist() for _ in range(5)] == [[page] for page in ORDERS[eviction]]


@BOTH_CORES
def test_slru_keeps_what_was_hit_from_a_flood(core):
    cache = used("slru", core)
    for prompt in range(10, 15):
        cache.insert([prompt], [prompt])
    assert cache.evict(7).tolist() == [2, 4, 10, 11, 12, 13, 14]


@BOTH_CORES
def test_priority_of_a_continuation_protects_what_it_stands_on(core):
    cache = RadixCache(1, "priority", core=core)
    cache.insert([1], [0])
    cache.insert([1, 2], [0, 1], priority=3)
    cache.insert([5], [2], priority=1)
    cache.insert([1, 9], [0, 3], priority=2)
    handle = cache.insert([7], [4]).handle
    cache.extend(handle, [7], [5], priority=9)
    assert cache.evict(6).tolist() == [2, 3, 1, 0, 5, 4]


@BOTH_CORES
def test_prompt_is_kept_before_its_output(core):
    """The last pages of the run that goes first, then those before them, and only then another run."""
    cache = RadixCache(1, core=core)
    for start in (0, 100):
        handle = cache.insert(range(start, start + 4), range(start, start + 4)).handle
        cache.lock(handle)
        longer = cache.extend(handle, [7, 8], [start + 4, start + 5]).handle
        cache.lock(longer)
        cache.unlock(handle)
        cache.unlock(longer)
    assert [cache.evict(2).tolist() for _ in range(4)] == [[4, 5], [2, 3], [0, 1], [104, 105]]


@BOTH_CORES
def test_a_policy_of_the_user_decides_what_goes(core):
    cache = RadixCache(1, eviction=NewestFirst(), core=core)
    cache.insert([1, 1], [0, 1])
    cache.insert([2, 2], [2, 3])
    cache.match([1, 1])
    assert cache.evict(2).tolist() == [0, 1]


class Everything(LRUPolicy):
    """Notes what it may look at. Not LRU itself, so the native core asks it."""

    def __init__(self):
        self.seen = set()

    def priority(self, run):
        self.seen.add((run.num_pages, run.created, run.last_access, run.num_hits, run.priority, run.is_evictable))
        return ()


@BOTH_CORES
def test_a_policy_sees_what_is_promised(core):
    policy = Everything()
    cache = RadixCache(1, eviction=policy, core=core)
    cache.insert([1, 2, 3], [0, 1, 2], priority=4)
    cache.match([1, 2, 3])
    cache.match([1, 9])
    assert policy.seen == {(3, 1, 1, 0, 4, True), (3, 1, 2, 1, 4, True), (2, 1, 2, 1, 4, True)}


@BOTH_CORES
def test_a_policy_by_a_new_name_runs_on_both_cores(core, monkeypatch):
    monkeypatch.setattr("pagedkv.management.eviction._POLICIES", {})
    register_eviction_policy("newest", NewestFirst)
    cache = RadixCache(1, "newest", core=core)
    cache.insert([1], [0])
    cache.insert([2], [1])
    assert cache.evict(1).tolist() == [1]


@BOTH_CORES
def test_a_cache_with_a_policy_of_the_user_is_given_back(core):
    policy = NewestFirst()
    cache = RadixCache(1, policy, core=core)
    cache.insert([1], [0])
    gone = weakref.ref(policy)
    del cache, policy
    gc.collect()
    assert gone() is None


@pytest.mark.native
def test_a_policy_that_calls_the_cache_is_refused():
    class Meddler:
        def priority(self, run):
            cache.match([1])
            return (0.0,)

    cache = RadixCache(1, Meddler(), core="native")
    cache.insert([1], [0])
    with pytest.raises(RuntimeError, match="a RadixCache must be used by one thread at a time, got a call during"):
        cache.evict(1)
    assert cache.num_cached_pages == 1
