"""What goes first, and that no more goes than was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...management.eviction import eviction_policies
from .case import Check, World, equal, refused

__all__ = ["EVICTION_CHECKS"]


class _NewestFirst:
    """A user's own policy. Its priority falls when a run is used, the opposite of LRU."""

    def priority(self, run: Any) -> tuple[float, ...]:
        """The last access, turned round."""
        return (-run.last_access,)


def _one_by_one(cache: Any, num_pages: int) -> list[int]:
    """The pages of as many evictions of one page."""
    return [page for _ in range(num_pages) for page in cache.evict(1).tolist()]


def _the_tail_goes_first_and_no_more_than_asked(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "abcde", [0, 1, 2, 3, 4])
    equal("pages evicted of 0", cache.evict(0).tolist(), [])
    evicted = cache.evict(2)
    equal("their dtype", evicted.dtype.name, "int32")
    equal("pages evicted of 2", sorted(evicted.tolist()), [3, 4])
    equal("pages of 'abcde'", world.found(cache, "abcde"), [0, 1, 2])
    equal("pages held", cache.held_mask(6).tolist(), [True] * 3 + [False] * 3)
    equal("pages evicted of 9", sorted(cache.evict(9).tolist()), [0, 1, 2])
    equal("pages evicted of an empty cache", cache.evict(9).tolist(), [])
    equal("counters", (cache.num_cached_pages, cache.num_evictable_pages), (0, 0))


def _leaves_go_before_what_they_continue(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "ab", [0, 1])
    world.insert(cache, "cd", [2, 3])
    world.insert(cache, "ae", [0, 4])
    world.found(cache, "cd")
    equal("pages evicted one by one", _one_by_one(cache, 5), [1, 4, 0, 3, 2])


def _one_eviction_goes_through_many_branches(world: World) -> None:
    cache = world.cache()
    for page, letter in enumerate("bcdefgh", start=1):
        world.insert(cache, "a" + letter, [0, page])
    for num_asked, left in ((3, 5), (4, 1), (1, 0)):
        equal("pages evicted", len(set(cache.evict(num_asked).tolist())), num_asked)
        equal("num_cached_pages", cache.num_cached_pages, left)


def _partial_hit_refreshes_what_was_hit(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "abcd", [0, 1, 2, 3])
    world.insert(cache, "xy", [4, 5])
    world.found(cache, "abz")
    # The end of the first prompt is the oldest now, then "xy"; its beginning was used last.
    equal("pages evicted", sorted(cache.evict(3).tolist()), [2, 3, 5])
    equal("pages of 'ab'", world.found(cache, "ab"), [0, 1])


def _hit_refreshes_the_beginning_too(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "ab", [0, 1])
    world.insert(cache, "xy", [2, 3])
    world.insert(cache, "abc", [0, 1, 4])
    # Nothing of "xy" was used since, so it goes before the beginning of "abc" does.
    equal("pages evicted one by one", _one_by_one(cache, 5), [3, 2, 4, 1, 0])


def _every_use_counts(world: World) -> None:
    uses: dict[str, Callable[[Any, Any], object]] = {
        "a match": lambda cache, _: world.found(cache, "a"),
        "an insert": lambda cache, _: world.insert(cache, "a", [9]),
        "an insert with only_new": lambda cache, _: world.insert(cache, "ac", [8, 9], only_new=True),
        "an unlock": lambda cache, handle: cache.unlock(handle),
    }
    for name, use in uses.items():
        cache = world.cache()
        handle = world.insert(cache, "a", [0]).handle
        cache.lock(handle)
        world.insert(cache, "b", [1])
        if name != "an unlock":
            cache.unlock(handle)
            world.found(cache, "b")
        use(cache, handle)
        equal(f"the page evicted after {name}", cache.evict(1).tolist(), [1])


def _extending_uses_what_is_extended(world: World) -> None:
    cache = world.cache()
    handle = world.insert(cache, "a", [0]).handle
    world.insert(cache, "b", [1])
    world.extend(cache, handle, "c", [2])
    equal("pages evicted one by one", _one_by_one(cache, 3), [1, 2, 0])


def _a_lookup_that_finds_nothing_uses_nothing(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "a", [0])
    world.insert(cache, "b", [1])
    world.found(cache, "A")
    world.found(cache, "a", "other")
    equal("the page evicted", cache.evict(1).tolist(), [0])


def _evicted_pages_come_back(world: World) -> None:
    cache = world.cache()
    for number in range(50):
        word = "abcdefgh"[number % 8 :] + "xyz"[: number % 3]
        result = world.insert(cache, word, list(range(len(word))))
        equal("num_cached", result.num_cached, 0)
        equal("pages evicted", sorted(cache.evict(len(word)).tolist()), list(range(len(word))))
    equal("num_cached_pages", cache.num_cached_pages, 0)


def _a_policy_of_the_user_decides(world: World) -> None:
    policy = _NewestFirst()
    cache = world.cache(eviction=policy)
    equal("eviction_policy", cache.eviction_policy, policy)
    world.insert(cache, "ab", [0, 1])
    world.insert(cache, "cd", [2, 3])
    world.found(cache, "ab")
    equal("pages evicted", sorted(cache.evict(2).tolist()), [0, 1])


def _what_is_left_is_always_a_prefix(world: World) -> None:
    words = {"abcd": [0, 1, 2, 3], "abef": [0, 1, 4, 5], "g": [6], "ahij": [0, 7, 8, 9]}
    for policy in eviction_policies():
        cache = world.cache(eviction=policy)
        for priority, (word, pages) in enumerate(words.items()):
            world.insert(cache, word, pages, priority=priority % 2)
            world.found(cache, "abe")
        left = set(range(10))
        while left:
            (page,) = cache.evict(1).tolist()
            left.remove(page)
            for word, pages in words.items():
                found = world.found(cache, word)
                equal(f"pages of {word!r} under {policy}", found, pages[: len(found)])
                equal(f"pages left of {word!r} under {policy}", set(found), left & set(pages))


def _the_greatest_priority_stays(world: World) -> None:
    cache = world.cache(eviction="priority")
    world.insert(cache, "ab", [0, 1], priority=2)
    world.insert(cache, "cd", [2, 3], priority=0)
    world.insert(cache, "ef", [4, 5], priority=1)
    world.extend(cache, world.handle(cache, "ab"), "g", [6], priority=0)
    equal("pages evicted", sorted(cache.evict(3).tolist()), [2, 3, 6])
    equal("pages evicted", sorted(cache.evict(2).tolist()), [4, 5])
    equal("pages of 'ab'", world.found(cache, "ab"), [0, 1])


def _what_was_continued_keeps_its_priority(world: World) -> None:
    cache = world.cache(eviction="priority")
    world.insert(cache, "a", [0], priority=0)
    world.insert(cache, "ab", [0, 1], priority=2)
    world.insert(cache, "c", [2], priority=1)
    equal("pages evicted one by one", _one_by_one(cache, 2), [2, 1])
    world.insert(cache, "d", [3], priority=1)
    world.insert(cache, "a", [9], priority=0)
    equal("pages evicted one by one", _one_by_one(cache, 2), [3, 0])


def _hits_count_for_what_was_continued(world: World) -> None:
    cache = world.cache(eviction="lfu")
    world.insert(cache, "ab", [0, 1])
    world.insert(cache, "cd", [2, 3])
    for word in ("ab", "ab", "ab", "a", "a", "c", "c", "c", "c"):
        world.found(cache, word)
    # Hit 0, 3, 4 and 5 times.
    equal("pages evicted one by one", _one_by_one(cache, 4), [3, 1, 2, 0])


def _eviction_must_be_a_policy(world: World) -> None:
    with refused("eviction must be"):
        world.cache(eviction="no such policy")
    with refused("eviction must be a name or have a method priority(run), got int", TypeError):
        world.cache(eviction=3)


EVICTION_CHECKS: list[Check] = [
    _the_tail_goes_first_and_no_more_than_asked,
    _leaves_go_before_what_they_continue,
    _one_eviction_goes_through_many_branches,
    _partial_hit_refreshes_what_was_hit,
    _hit_refreshes_the_beginning_too,
    _every_use_counts,
    _extending_uses_what_is_extended,
    _a_lookup_that_finds_nothing_uses_nothing,
    _evicted_pages_come_back,
    _a_policy_of_the_user_decides,
    _what_is_left_is_always_a_prefix,
    _the_greatest_priority_stays,
    _what_was_continued_keeps_its_priority,
    _hits_count_for_what_was_continued,
    _eviction_must_be_a_policy,
]
