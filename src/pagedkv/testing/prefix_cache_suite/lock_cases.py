"""Locks: what they protect, that they survive every change of the cache, and handles."""

from __future__ import annotations

from .case import Check, World, equal, refused

__all__ = ["LOCK_CHECKS"]


def _counters_follow_locks(world: World) -> None:
    cache = world.filled()
    handle = world.handle(cache, "ab")
    cache.lock(handle)
    cache.lock(handle)
    equal("counters of a prefix locked twice", (cache.num_cached_pages, cache.num_evictable_pages), (4, 2))
    cache.unlock(handle)
    equal("num_evictable_pages", cache.num_evictable_pages, 2)
    cache.unlock(handle)
    equal("num_evictable_pages", cache.num_evictable_pages, 4)


def _locked_prefix_survives_eviction_of_everything_else(world: World) -> None:
    cache = world.filled()
    handle = world.handle(cache, "ab")
    cache.lock(handle)
    equal("pages evicted", sorted(cache.evict(100).tolist()), [12, 13])
    equal("pages of 'abc'", world.found(cache, "abc"), [10, 11])
    equal("pages evicted", cache.evict(100).tolist(), [])
    cache.unlock(handle)
    equal("pages evicted", sorted(cache.evict(100).tolist()), [10, 11])
    equal("counters", (cache.num_cached_pages, cache.num_evictable_pages), (0, 0))


def _lock_covers_the_page_it_names(world: World) -> None:
    cache = world.cache()
    handle = world.insert(cache, "a", [3]).handle
    cache.lock(handle)
    equal("num_evictable_pages", cache.num_evictable_pages, 0)
    equal("pages evicted", cache.evict(1).tolist(), [])


def _the_oldest_is_passed_over_while_locked(world: World) -> None:
    cache = world.cache()
    oldest = world.insert(cache, "ab", [0, 1]).handle
    cache.lock(oldest)
    world.insert(cache, "xy", [2, 3])
    equal("pages evicted", sorted(cache.evict(3).tolist()), [2, 3])
    equal("pages of 'ab'", world.found(cache, "ab"), [0, 1])
    cache.unlock(oldest)
    equal("pages evicted", cache.evict(1).tolist(), [1])


def _whole_lock_survives_a_split(world: World) -> None:
    cache = world.cache()
    whole = world.insert(cache, "abcd", [0, 1, 2, 3]).handle
    cache.lock(whole)
    part = world.handle(cache, "abx")
    equal("num_evictable_pages", cache.num_evictable_pages, 0)
    cache.lock(part)
    cache.unlock(whole)
    equal("num_evictable_pages", cache.num_evictable_pages, 2)
    equal("pages evicted", sorted(cache.evict(10).tolist()), [2, 3])
    cache.unlock(part)
    equal("num_evictable_pages", cache.num_evictable_pages, 2)


def _counts_of_locks_survive_splits(world: World) -> None:
    cache = world.cache()
    whole = world.insert(cache, "abcdef", [0, 1, 2, 3, 4, 5]).handle
    for _ in range(3):
        cache.lock(whole)
    parts = [world.handle(cache, word) for word in ("ax", "abcdx", "abx")]
    for part in parts:
        cache.lock(part)
    for evictable in (0, 0, 2):
        cache.unlock(whole)
        equal("num_evictable_pages", cache.num_evictable_pages, evictable)
    for part, evictable in zip(parts, (2, 4, 6), strict=True):
        cache.unlock(part)
        equal("num_evictable_pages", cache.num_evictable_pages, evictable)


def _handle_taken_before_a_split_can_still_be_used(world: World) -> None:
    cache = world.cache()
    handle = world.insert(cache, "abcd", [0, 1, 2, 3]).handle
    cache.lock(handle)
    world.insert(cache, "abx", [0, 1, 9])
    equal("its tokens", cache.locked_tokens(handle, 0).tolist(), world.ids("abcd").tolist())
    start = cache.ancestor(handle, world.num_tokens("abc"))
    equal("tokens of its ancestor", cache.locked_tokens(start, 0).tolist(), world.ids("abc").tolist())
    world.extend(cache, handle, "e", [4])
    equal("pages of 'abcde'", world.found(cache, "abcde"), [0, 1, 2, 3, 4])


def _a_lock_protects_nothing_behind_it(world: World) -> None:
    cache = world.cache()
    handle = world.insert(cache, "a", [0]).handle
    cache.lock(handle)
    cache.lock(handle)
    world.extend(cache, handle, "b", [1])
    equal("num_evictable_pages", cache.num_evictable_pages, 1)
    world.insert(cache, "ac", [0, 2])
    equal("pages evicted", sorted(cache.evict(5).tolist()), [1, 2])


def _a_locked_handle_outlives_what_others_put_behind_it(world: World) -> None:
    cache = world.cache()
    handle = world.insert(cache, "ab", [0, 1]).handle
    cache.lock(handle)
    # Somebody else finds the prefix, does not lock it, and goes on from there.
    world.extend(cache, world.handle(cache, "ab"), "cd", [2, 3])
    for word in ("aby", "ax", "abcz"):
        pages = [10 * len(word) + number for number in range(len(word))]
        world.insert(cache, word, pages)
        equal("its tokens", cache.locked_tokens(handle, 0).tolist(), world.ids("ab").tolist())
        start = cache.ancestor(handle, world.page_size)
        equal("tokens of its ancestor", cache.locked_tokens(start, 0).tolist(), world.ids("a").tolist())
    equal("num_cached of an extension", world.extend(cache, handle, "cd", [50, 51]).num_cached, world.num_tokens("cd"))
    world.extend(cache, handle, "e", [60])
    equal("pages of 'abe'", world.found(cache, "abe"), [0, 1, 60])
    cache.unlock(handle)
    with refused("handle must be locked"):
        cache.unlock(handle)
    equal("pages not evictable", cache.num_cached_pages - cache.num_evictable_pages, 0)


def _unlocking_more_often_than_locking_is_refused(world: World) -> None:
    cache = world.filled()
    deep, shallow = world.handle(cache, "abc"), world.handle(cache, "a")
    with refused("handle must be locked, got one of"):
        cache.unlock(deep)
    cache.lock(deep)
    # The first page is locked through the third, but nobody locked its own handle.
    with refused(f"handle must be locked, got one of {world.page_size} tokens that is not"):
        cache.unlock(shallow)
    equal("num_evictable_pages", cache.num_evictable_pages, 1)
    cache.unlock(deep)
    with refused("handle must be locked"):
        cache.unlock(deep)
    equal("num_evictable_pages", cache.num_evictable_pages, 4)
    equal("pages evicted", len(cache.evict(9)), 4)


def _handle_of_what_was_evicted_is_refused(world: World) -> None:
    for num_evicted in (1, 3):
        cache = world.cache()
        handle = world.insert(cache, "abc", [0, 1, 2]).handle
        cache.evict(num_evicted)
        words = f"handle must name a prefix that is still cached, got one of {3 * world.page_size} tokens"
        with refused(words):
            cache.lock(handle)
        with refused(words):
            world.extend(cache, handle, "d", [5])
        with refused(words):
            cache.ancestor(handle, world.page_size)
        with refused("handle must"):
            cache.unlock(handle)
        equal("num_evictable_pages", cache.num_evictable_pages, 3 - num_evicted)
        world.insert(cache, "abc", [0, 1, 7] if num_evicted == 1 else [7, 8, 9])
        with refused(words):
            cache.lock(handle)


def _handle_of_what_was_reset_is_refused(world: World) -> None:
    cache = world.filled()
    handle = world.handle(cache, "abc")
    cache.reset()
    world.insert(cache, "abc", [10, 11, 12])
    with refused("handle must name a prefix that is still cached"):
        cache.lock(handle)


def _handle_of_another_cache_is_refused(world: World) -> None:
    mine, other = world.filled(), world.filled()
    handle = world.handle(other, "abc")
    other.lock(handle)
    calls = [
        mine.lock,
        mine.unlock,
        lambda it: mine.ancestor(it, world.page_size),
        lambda it: mine.locked_tokens(it, 0),
    ]
    calls.append(lambda it: world.extend(mine, it, "d", [20]))
    for call in calls:
        with refused("handle must be one of this cache, got"):
            call(handle)
        for wrong in (None, 3, "abc", ()):
            with refused("handle must", TypeError, ValueError):
                call(wrong)
    equal("counters", (mine.num_cached_pages, mine.num_evictable_pages), (4, 4))
    equal("counters of the other", (other.num_cached_pages, other.num_evictable_pages), (4, 1))
    other.unlock(handle)


def _empty_handle_can_be_locked_and_unlocked(world: World) -> None:
    cache = world.filled()
    handles = [world.handle(cache, "xyz", namespace) for namespace in (None, "unknown")]
    handles += [cache.insert([], []).handle, cache.ancestor(world.handle(cache, "ab"), 0)]
    for handle in handles:
        equal("num_tokens", handle.num_tokens, 0)
        cache.lock(handle)
        cache.unlock(handle)
        equal("its tokens", cache.locked_tokens(handle, 0).tolist(), [])
        with refused("handle must name a cached prefix to be extended, got an empty one"):
            world.extend(cache, handle, "a", [20])
    equal("num_evictable_pages", cache.num_evictable_pages, 4)


def _ancestor_names_the_start_of_a_prefix(world: World) -> None:
    cache, page_size = world.filled(), world.page_size
    handle = world.handle(cache, "abc")
    cache.lock(handle)
    start = cache.ancestor(handle, 2 * page_size)
    cache.lock(start)
    cache.unlock(handle)
    equal("pages evicted", sorted(cache.evict(9).tolist()), [12, 13])
    equal("its own ancestor", cache.ancestor(start, 2 * page_size), start)
    equal("tokens of none", cache.ancestor(start, 0).num_tokens, 0)
    for num_tokens in {1, page_size + 1, 2 * page_size + 1, 3 * page_size} - {page_size, 2 * page_size}:
        with refused(f"num_tokens must be whole pages of {page_size} and at most {2 * page_size}, got {num_tokens}"):
            cache.ancestor(start, num_tokens)
    with refused("num_tokens must be at least 0, got -1"):
        cache.ancestor(start, -1)
    equal("pages of 'ab'", world.found(cache, "ab"), [10, 11])


def _ancestors_lock_like_any_handle(world: World) -> None:
    cache = world.cache()
    whole = world.insert(cache, "abcdef", [0, 1, 2, 3, 4, 5]).handle
    cache.lock(whole)
    starts = [cache.ancestor(whole, num_pages * world.page_size) for num_pages in (5, 2, 4)]
    for start in starts:
        cache.lock(start)
    cache.unlock(whole)
    # The longest goes first, then the shortest, whose pages the third covers too.
    for start, evictable in zip(starts, (1, 2, 2), strict=True):
        equal("num_evictable_pages", cache.num_evictable_pages, evictable)
        cache.unlock(start)
    equal("num_evictable_pages", cache.num_evictable_pages, 6)


def _locked_tokens_begin_anywhere(world: World) -> None:
    cache = world.filled()
    handle = world.handle(cache, "abc")
    cache.lock(handle)
    tokens = world.ids("abc").tolist()
    for start in {0, 1, world.page_size - 1, world.page_size, world.page_size + 1, len(tokens) - 1, len(tokens)}:
        found = cache.locked_tokens(handle, start)
        equal("their dtype", found.dtype.name, "int64")
        equal(f"tokens from {start} on", found.tolist(), tokens[start:])
    with refused("start must be at least 0, got -1"):
        cache.locked_tokens(handle, -1)


def _reset_needs_no_locks(world: World) -> None:
    cache = world.filled()
    handle = world.handle(cache, "a")
    cache.lock(handle)
    with refused("the cache must not be locked to be reset, got 1 locked pages"):
        cache.reset()
    equal("pages of 'abc'", world.found(cache, "abc"), [10, 11, 12])
    cache.unlock(handle)
    equal("pages returned", sorted(cache.reset().tolist()), [10, 11, 12, 13])
    equal("counters", (cache.num_cached_pages, cache.num_evictable_pages), (0, 0))
    equal("pages held", int(cache.held_mask(20).sum()), 0)
    equal("pages of 'a'", world.found(cache, "a"), [])
    equal("num_cached", world.insert(cache, "abc", [12, 11, 10]).num_cached, 0)
    equal("pages of 'abc'", world.found(cache, "abc"), [12, 11, 10])
    equal("pages evicted", len(cache.evict(9)), 3)
    equal("pages of an empty cache", cache.reset().tolist(), [])


LOCK_CHECKS: list[Check] = [
    _counters_follow_locks,
    _locked_prefix_survives_eviction_of_everything_else,
    _lock_covers_the_page_it_names,
    _the_oldest_is_passed_over_while_locked,
    _whole_lock_survives_a_split,
    _counts_of_locks_survive_splits,
    _handle_taken_before_a_split_can_still_be_used,
    _a_lock_protects_nothing_behind_it,
    _a_locked_handle_outlives_what_others_put_behind_it,
    _unlocking_more_often_than_locking_is_refused,
    _handle_of_what_was_evicted_is_refused,
    _handle_of_what_was_reset_is_refused,
    _handle_of_another_cache_is_refused,
    _empty_handle_can_be_locked_and_unlocked,
    _ancestor_names_the_start_of_a_prefix,
    _ancestors_lock_like_any_handle,
    _locked_tokens_begin_anywhere,
    _reset_needs_no_locks,
]
