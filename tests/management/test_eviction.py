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


def test_queue_holds_a_run_once():
    queue = EvictionQueue(LRUPolicy())
    run = Run(1)
    for time in range(2, 50):
        queue.offer(run)
        run.last_access = time
    assert len(queue) == 1


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
    with pytest.raises(ValueError, match="eviction must be 'lru' or a policy, got 'lfu2'"):
        RadixCache(4, eviction="lfu2")
    with pytest.raises(TypeError, match=r"eviction must be a name or have a method priority\(run\), got int"):
        KVCacheManager(4, page_size=1, eviction=3)


def test_a_policy_of_the_user_decides_what_goes():
    cache = RadixCache(1, eviction=NewestFirst())
    cache.insert([1, 1], [0, 1])
    cache.insert([2, 2], [2, 3])
    cache.match([1, 1])
    assert cache.evict(2).tolist() == [0, 1]
