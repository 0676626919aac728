"""Wrong input: refused with words that say what was wrong, and nothing has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .case import Check, World, equal, refused

__all__ = ["REFUSAL_CHECKS"]


@contextmanager
def _unchanged(world: World, cache: Any) -> Iterator[None]:
    """A cache made by `World.filled` is the same after the block."""
    yield
    equal("counters", (cache.num_cached_pages, cache.num_evictable_pages), (4, 4))
    equal("pages held", cache.held_mask(100).nonzero()[0].tolist(), [10, 11, 12, 13])
    equal("pages of all prompts", [world.found(cache, word) for word in ("abc", "ad")], [[10, 11, 12], [10, 13]])
    # Pages that a refused call named are still free to come.
    equal("num_cached", world.insert(cache, "zy", [30, 31]).num_cached, 0)
    equal("pages evicted of 'zy'", sorted(cache.evict(9).tolist()), [10, 11, 12, 13, 30, 31])


def _wrong_token_ids_are_refused(world: World) -> None:
    wrong: list[tuple[Any, str, type[Exception]]] = [
        (np.zeros(4, np.float32), "token_ids must have dtype int32 or int64, got float32", TypeError),
        (torch.zeros(4), "token_ids must have dtype int32 or int64, got float32", TypeError),
        (np.zeros(4, np.uint32), "token_ids must have dtype int32 or int64, got uint32", TypeError),
        (np.zeros((2, 2), np.int64), "token_ids must have shape [n], got [2, 2]", ValueError),
        ([1, -5, 3], "token_ids must be 0 or more, got -5 at position 1", ValueError),
        ([2**63], "token_ids must be below 2**63", ValueError),
        ([1.5], "token_ids must be ints, got float", TypeError),
        (["a"], "token_ids must be ints, got str", TypeError),
        ("abc", "token_ids must be a list of ints", TypeError),
        (None, "token_ids must be a list of ints", TypeError),
    ]
    for token_ids, words, kind in wrong:
        cache = world.filled()
        handle = world.handle(cache, "ab")
        with _unchanged(world, cache):
            with refused(words, kind):
                cache.match(token_ids)
            with refused(words, kind):
                cache.insert(token_ids, [])
            with refused(words, kind):
                cache.extend(handle, token_ids, [])


def _wrong_pages_are_refused(world: World) -> None:
    wrong: list[tuple[Any, str, type[Exception]]] = [
        ([12, 30], "pages must not be in the cache yet, got page 12", ValueError),
        ([30, 12], "pages must not be in the cache yet, got page 12", ValueError),
        ([30, 30], "pages must name each page once, got page 30 twice", ValueError),
        ([-1, 30], "pages must be in 0..2**31 - 2, got -1..30", ValueError),
        ([30, 2**31 - 1], "pages must be in 0..2**31 - 2, got 30..2147483647", ValueError),
        ([30], "pages must have shape [2]", ValueError),
        ([30, 31, 32], "pages must have shape [2]", ValueError),
        ([[30, 31]], "pages must have shape [", ValueError),
        ([], "pages must have shape [2]", ValueError),
        ([0.5, 1.0], "pages must be integers, got float64", TypeError),
    ]
    for pages, words, kind in wrong:
        cache = world.filled()
        handle = world.handle(cache, "ab")
        with _unchanged(world, cache):
            with refused(words, kind):
                cache.insert(world.ids("xy", world.page_size - 1), pages)
            with refused(words, kind):
                cache.extend(handle, world.ids("xy", world.page_size - 1), pages)
            with refused(words, kind):
                cache.insert(world.ids("xy"), pages, "other")


def _a_page_behind_what_is_there_is_checked_too(world: World) -> None:
    cache = world.filled()
    with _unchanged(world, cache):
        with refused("pages must not be in the cache yet, got page 13"):
            world.insert(cache, "abx", [10, 11, 13])
        with refused("pages must not be in the cache yet, got page 10"):
            world.insert(cache, "ay", [13, 10])


def _wrong_namespaces_are_refused(world: World) -> None:
    cache = world.filled()
    with _unchanged(world, cache):
        for namespace in (1.5, ["a"], {}, ("a", ["b"]), object(), np.int64(3), ("a", ("b", 2.0))):
            with refused("namespace must be None, a str, bytes, an int or a tuple of these, got", TypeError):
                cache.match(world.ids("a"), namespace)
            with refused("namespace must be None, a str, bytes, an int or a tuple of these, got", TypeError):
                world.insert(cache, "a", [30], namespace)


def _wrong_numbers_are_refused(world: World) -> None:
    cache = world.filled()
    with _unchanged(world, cache):
        for wrong in (1.0, "1", None, True):
            with refused("num_pages must be an int, got", TypeError):
                cache.evict(wrong)
        with refused("num_pages must be at least 0, got -1"):
            cache.evict(-1)
        for wrong in (1.5, "1"):
            with refused("priority must be an int, got", TypeError):
                world.insert(cache, "x", [30], priority=wrong)
    with refused("page_size must be at least 1, got 0"):
        world.make(0)
    with refused("page_size must be an int, got", TypeError):
        world.make(2.0)


REFUSAL_CHECKS: list[Check] = [
    _wrong_token_ids_are_refused,
    _wrong_pages_are_refused,
    _a_page_behind_what_is_there_is_checked_too,
    _wrong_namespaces_are_refused,
    _wrong_numbers_are_refused,
]
