"""What a cache tells a router: what came, what left, by hashes that the router can compute itself."""

from __future__ import annotations

from typing import Any

from ...management.events import AllBlocksCleared, BlockRemoved, BlockStored
from ...management.page_hash import digest_pages, namespace_digest, short_hash
from .case import Check, World, equal, refused

__all__ = ["EVENT_CHECKS", "hashes_of"]


def hashes_of(world: World, word: str, namespace: Any = None) -> tuple[int, ...]:
    """The published hashes of the pages of `word`."""
    return tuple(map(short_hash, digest_pages(namespace_digest(namespace), world.ids(word), world.page_size)))


def _taken(cache: Any) -> list[Any]:
    """The events since the last call."""
    events: list[Any] = cache.events.take()
    return events


def _no_log_unless_asked_for(world: World) -> None:
    equal("events", world.cache().events, None)
    equal("events of an empty cache", _taken(world.cache(events=True)), [])


def _an_insert_is_stored(world: World) -> None:
    cache = world.cache(events=True)
    cache.insert(world.ids("abc", world.page_size - 1), [10, 11, 12])
    wanted = BlockStored(hashes_of(world, "abc"), None, tuple(world.ids("abc").tolist()), world.page_size)
    equal("events of the first insert", _taken(cache), [wanted])
    equal("events after they were taken", _taken(cache), [])


def _only_new_pages_are_stored(world: World) -> None:
    cache = world.filled(events=True)
    _taken(cache)
    world.insert(cache, "abef", [20, 21, 22, 23])
    hashes = hashes_of(world, "abef")
    wanted = BlockStored(hashes[2:], hashes[1], tuple(world.ids("ef").tolist()), world.page_size)
    equal("events of a branch", _taken(cache), [wanted])
    world.insert(cache, "abe", [30, 31, 32])
    world.insert(cache, "abg", [30, 31, 32], only_new=True)
    cache.insert([], [])
    equal("events of inserts that add nothing", _taken(cache), [])


def _an_extension_names_its_parent(world: World) -> None:
    cache = world.cache(events=True)
    handle = world.insert(cache, "ab", [0, 1]).handle
    cache.lock(handle)
    _taken(cache)
    longer = world.extend(cache, handle, "cd", [2, 3]).handle
    cache.lock(longer)
    cache.unlock(handle)
    world.extend(cache, longer, "e", [4])
    hashes = hashes_of(world, "abcde")
    wanted = [
        BlockStored(hashes[2:4], hashes[1], tuple(world.ids("cd").tolist()), world.page_size),
        BlockStored(hashes[4:], hashes[3], tuple(world.ids("e").tolist()), world.page_size),
    ]
    equal("events of two extensions", _taken(cache), wanted)


def _lookups_locks_and_splits_are_no_events(world: World) -> None:
    cache = world.cache(events=True)
    handle = world.insert(cache, "abcd", [0, 1, 2, 3]).handle
    _taken(cache)
    cache.lock(handle)
    cache.lock(world.handle(cache, "abx"))
    cache.ancestor(handle, world.page_size)
    cache.unlock(handle)
    equal("events", _taken(cache), [])
    equal("pages evicted", sorted(cache.evict(9).tolist()), [2, 3])
    (event,) = _taken(cache)
    equal("hashes removed", sorted(event.block_hashes), sorted(hashes_of(world, "abcd")[2:]))


def _an_eviction_is_removed(world: World) -> None:
    cache = world.filled(events=True)
    _taken(cache)
    cache.evict(0)
    equal("events of no eviction", _taken(cache), [])
    cache.evict(1)
    equal("events", _taken(cache), [BlockRemoved(hashes_of(world, "abc")[2:])])
    cache.evict(9)
    events = _taken(cache)
    equal("kinds of events", {type(event) for event in events}, {BlockRemoved})
    removed = [value for event in events for value in event.block_hashes]
    equal("hashes removed", sorted(removed), sorted(hashes_of(world, "ab") + hashes_of(world, "ad")[1:]))
    cache.evict(9)
    equal("events of an empty cache", _taken(cache), [])


def _a_page_that_comes_back_is_stored_again(world: World) -> None:
    cache = world.filled(events=True)
    cache.evict(9)
    _taken(cache)
    world.insert(cache, "xy", [10, 11])
    wanted = BlockStored(hashes_of(world, "xy"), None, tuple(world.ids("xy").tolist()), world.page_size)
    equal("events", _taken(cache), [wanted])


def _a_reset_is_cleared(world: World) -> None:
    cache = world.filled(events=True)
    _taken(cache)
    cache.reset()
    equal("events", _taken(cache), [AllBlocksCleared()])
    world.insert(cache, "a", [10])
    equal("kinds of events", [type(event) for event in _taken(cache)], [BlockStored])


def _namespaces_have_hashes_of_their_own(world: World) -> None:
    cache = world.cache(events=True)
    namespaces = [None, "", 0, False, ("a", "b"), ("ab",)]
    for page, namespace in enumerate(namespaces):
        world.insert(cache, "a", [page], namespace)
    events = _taken(cache)
    equal("hashes", [event.block_hashes for event in events], [hashes_of(world, "a", it) for it in namespaces])
    equal("different hashes", len({event.block_hashes for event in events}), len(namespaces))
    wanted = [None if namespace is None else ((namespace,),) for namespace in namespaces]
    equal("extra_keys", [event.extra_keys for event in events], wanted)


def _a_refused_call_is_no_event(world: World) -> None:
    cache = world.filled(events=True)
    handle = world.handle(cache, "ab")
    cache.lock(handle)
    _taken(cache)
    with refused("pages must not be in the cache yet"):
        world.insert(cache, "xy", [20, 10])
    with refused("pages must name each page once"):
        world.extend(cache, handle, "xy", [20, 20])
    with refused("the cache must not be locked"):
        cache.reset()
    equal("events", _taken(cache), [])


EVENT_CHECKS: list[Check] = [
    _no_log_unless_asked_for,
    _an_insert_is_stored,
    _only_new_pages_are_stored,
    _an_extension_names_its_parent,
    _lookups_locks_and_splits_are_no_events,
    _an_eviction_is_removed,
    _a_page_that_comes_back_is_stored_again,
    _a_reset_is_cleared,
    _namespaces_have_hashes_of_their_own,
    _a_refused_call_is_no_event,
]
