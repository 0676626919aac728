"""What is found, what is added, and who may share with whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .case import Check, World, equal

__all__ = ["LOOKUP_CHECKS"]

NAMESPACES = (
    None, "", 0, False, b"", (), 1, True, "1", b"1", "a", b"a", "ab", ("a", "b"), ("ab",), ("a",), (("a",), "b"),
    ("a", ("b",)), (None,), ("",), (0,), (False,), -1, 255, 256, -256, 2**80, "\0", "\0\0", "é", "e\u0301",
)  # fmt: skip


def _match_finds_the_longest_prefix(world: World) -> None:
    cache = world.filled()
    for word, pages in {
        "abcd": [10, 11, 12], "abc": [10, 11, 12], "ab": [10, 11], "ad": [10, 13], "adc": [10, 13], "abd": [10, 11],
        "a": [10], "ac": [10], "b": [], "bc": [], "d": [], "": [],
    }.items():  # fmt: skip
        equal(f"pages of {word!r}", world.found(cache, word), pages)


def _match_rounds_down_to_whole_pages(world: World) -> None:
    cache, page_size = world.filled(), world.page_size
    ids = world.ids("abc")
    for length in {0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size - 1, 2 * page_size, 3 * page_size - 1}:
        num_tokens, pages, _ = cache.match(ids[:length])
        equal(f"tokens found of {length}", num_tokens, length // page_size * page_size)
        equal(f"pages of {length} tokens", pages.tolist(), [10, 11, 12][: length // page_size])


def _pages_that_differ_in_one_token_are_two(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "abc", [0, 1, 2])
    equal("pages found of 'aBc'", world.found(cache, "aBc"), [0])
    equal("pages found of 'Abc'", world.found(cache, "Abc"), [])
    equal("num_cached of 'aBc'", world.insert(cache, "aBc", [9, 3, 4]).num_cached, world.num_tokens("a"))
    equal("pages of 'abc'", world.found(cache, "abc"), [0, 1, 2])
    equal("pages of 'aBc'", world.found(cache, "aBc"), [0, 3, 4])


def _equal_pages_behind_other_tokens_are_two(world: World) -> None:
    cache = world.cache()
    world.insert(cache, "aaa", [0, 1, 2])
    world.insert(cache, "ba", [3, 4])
    equal("pages of 'aaaa'", world.found(cache, "aaaa"), [0, 1, 2])
    equal("pages of 'baa'", world.found(cache, "baa"), [3, 4])


def _insert_rounds_down_to_whole_pages(world: World) -> None:
    cache = world.cache()
    for number, num_more in enumerate({0, world.page_size // 2, world.page_size - 1}):
        result = cache.insert(world.ids("ab", num_more), [0, 1], number)
        equal("tokens of the handle", result.handle.num_tokens, world.num_tokens("ab"))
        cache.evict(2)
    nothing = cache.insert(world.ids("", world.page_size - 1), [])
    equal("an insert of less than a page", (nothing.num_cached, nothing.handle.num_tokens), (0, 0))
    equal("num_cached_pages", cache.num_cached_pages, 0)


def _empty_input_is_no_error(world: World) -> None:
    cache = world.filled()
    empties: list[Any] = [[], (), range(0), np.empty(0, np.int32), torch.empty(0, dtype=torch.int64)]
    for empty in empties:
        equal("pages found", cache.match(empty).pages.tolist(), [])
        result = cache.insert(empty, [])
        equal("an insert of nothing", (result.num_cached, result.handle.num_tokens), (0, 0))
    equal("pages evicted", cache.evict(0).tolist(), [])
    equal("num_cached_pages", cache.num_cached_pages, 4)


def _insert_keeps_what_is_there(world: World) -> None:
    cache = world.filled()
    result = world.insert(cache, "abe", [20, 21, 22])
    equal("num_cached", result.num_cached, world.num_tokens("ab"))
    equal("tokens of the handle", result.handle.num_tokens, world.num_tokens("abe"))
    equal("pages of 'abe'", world.found(cache, "abe"), [10, 11, 22])
    equal("num_cached_pages", cache.num_cached_pages, 5)
    # Pages 20 and 21 were not taken, so they may come with other tokens.
    equal("num_cached of 'xy'", world.insert(cache, "xy", [20, 21]).num_cached, 0)


def _insert_of_what_is_there_adds_nothing(world: World) -> None:
    cache = world.filled()
    for pages in ([10, 11, 12], [20, 21, 22]):
        result = world.insert(cache, "abc", pages)
        equal("num_cached", result.num_cached, world.num_tokens("abc"))
        equal("tokens of the handle", result.handle.num_tokens, world.num_tokens("abc"))
    equal("num_cached_pages", cache.num_cached_pages, 4)
    equal("pages of 'abc'", world.found(cache, "abc"), [10, 11, 12])


def _only_new_adds_nothing_behind_what_is_there(world: World) -> None:
    cache = world.filled()
    result = world.insert(cache, "abe", [20, 21, 22], only_new=True)
    equal("num_cached", result.num_cached, world.num_tokens("ab"))
    equal("tokens of the handle", result.handle.num_tokens, world.num_tokens("ab"))
    equal("num_cached_pages", cache.num_cached_pages, 4)
    equal("num_cached of what is new", world.insert(cache, "xy", [20, 21], only_new=True).num_cached, 0)
    equal("pages of 'xy'", world.found(cache, "xy"), [20, 21])


def _extend_is_insert_from_there_on(world: World) -> None:
    cache = world.filled()
    result = world.extend(cache, world.handle(cache, "ab"), "ef", [20, 21])
    equal("num_cached", result.num_cached, 0)
    equal("tokens of the handle", result.handle.num_tokens, world.num_tokens("abef"))
    equal("pages of 'abef'", world.found(cache, "abef"), [10, 11, 20, 21])
    equal("pages of 'abc'", world.found(cache, "abc"), [10, 11, 12])
    again = world.extend(cache, world.handle(cache, "ab"), "eg", [30, 31])
    equal("num_cached behind the handle", again.num_cached, world.num_tokens("e"))
    equal("pages of 'abeg'", world.found(cache, "abeg"), [10, 11, 20, 31])
    nothing = world.extend(cache, world.handle(cache, "ab"), "eh", [40, 41], only_new=True)
    equal("num_cached with only_new", nothing.num_cached, world.num_tokens("e"))
    equal("tokens of its handle", nothing.handle.num_tokens, world.num_tokens("abe"))
    equal("pages of 'abeh'", world.found(cache, "abeh"), [10, 11, 20])


def _extend_page_by_page_is_one_prefix(world: World) -> None:
    cache, word = world.cache(), "a"
    handle = world.insert(cache, "a", [0]).handle
    cache.lock(handle)
    for page, letter in enumerate("bcdefghijklmnopqrstuvwxyz", start=1):
        longer = world.extend(cache, handle, letter, [page]).handle
        cache.lock(longer)
        cache.unlock(handle)
        handle, word = longer, word + letter
    equal("pages", world.found(cache, word + "x"), list(range(26)))
    equal("num_evictable_pages", cache.num_evictable_pages, 0)
    cache.unlock(handle)
    equal("num_evictable_pages", cache.num_evictable_pages, 26)


def _a_prompt_of_many_parts_needs_no_recursion(world: World) -> None:
    cache = world.cache()
    handle = world.insert(cache, "a", [0]).handle
    for page in range(1, 1500):
        handle = world.extend(cache, handle, "a", [page]).handle
    cache.lock(handle)
    equal("pages found", world.found(cache, "a" * 1600), list(range(1500)))
    cache.unlock(handle)
    equal("pages evicted", len(cache.evict(2000)), 1500)


def _token_ids_come_in_many_forms(world: World) -> None:
    cache, ids = world.filled(), world.ids("abc")
    forms = [ids.tolist(), tuple(ids.tolist()), ids, ids.astype(np.int32), np.repeat(ids, 2)[::2]]
    forms += [torch.from_numpy(ids), torch.from_numpy(ids).to(torch.int32)]
    for form in forms:
        equal(f"pages found by a {type(form).__name__}", cache.match(form).pages.tolist(), [10, 11, 12])


def _arrays_of_the_caller_are_copied(world: World) -> None:
    for dtype in (np.int32, np.int64):
        tokens, pages = world.ids("ab").astype(dtype), np.array([5, 6], dtype)
        cache = world.cache()
        cache.insert(tokens, pages)
        tokens[:], pages[:] = 9, 9
        equal("pages of 'ab'", world.found(cache, "ab"), [5, 6])


def _results_are_copies(world: World) -> None:
    cache = world.filled()
    first = cache.match(world.ids("abc")).pages
    second = cache.match(world.ids("ad")).pages
    equal("pages of the first result", first.tolist(), [10, 11, 12])
    first[:] = 0
    equal("pages of the second result", second.tolist(), [10, 13])
    equal("pages of 'abc'", world.found(cache, "abc"), [10, 11, 12])
    mask = cache.held_mask(20)
    mask[:] = False
    equal("pages held", int(cache.held_mask(20).sum()), 4)
    evicted = cache.evict(1)
    evicted[:] = 10
    equal("pages held", cache.held_mask(20).nonzero()[0].tolist(), [10, 11, 12])


def _namespaces_do_not_see_each_other(world: World) -> None:
    cache = world.cache()
    for page, namespace in enumerate(NAMESPACES):
        equal(f"num_cached in {namespace!r}", world.insert(cache, "a", [page], namespace).num_cached, 0)
    for page, namespace in enumerate(NAMESPACES):
        equal(f"pages in {namespace!r}", world.found(cache, "ab", namespace), [page])
    equal("pages in a namespace that nobody used", world.found(cache, "a", "other"), [])


def _namespace_without_pages_leaves_nothing(world: World) -> None:
    cache = world.cache()
    for number in range(20):
        cache.match(world.ids("a"), ("tenant", number))
        world.insert(cache, "a", [number], ("tenant", number))
    cache.evict(20)
    equal("nodes", len(list(cache.nodes())), 0)
    world.insert(cache, "a", [0], ("tenant", 5))
    equal("pages", world.found(cache, "a", ("tenant", 5)), [0])


def _holds_tells_the_pages_in_the_cache(world: World) -> None:
    cache = world.filled()
    world.insert(cache, "x", [5000])
    for dtype in (np.int32, np.int64):
        asked = np.array([9, 10, 13, 14, 4999, 5000, 10**6], dtype)
        equal("holds", cache.holds(asked).tolist(), [False, True, True, False, False, True, False])
    equal("holds of nothing", cache.holds(np.empty(0, np.int32)).tolist(), [])
    for num_pages in (1, 12, 100, 5001, 10000):
        expected = [page for page in (10, 11, 12, 13, 5000) if page < num_pages]
        mask = cache.held_mask(num_pages)
        equal("length of the mask", mask.shape, (num_pages,))
        equal("pages of the mask", mask.nonzero()[0].tolist(), expected)
    cache.evict(1)
    equal("pages held after an eviction", int(cache.held_mask(10000).sum()), 4)


def _nodes_tell_all_that_is_held(world: World) -> None:
    cache = world.filled()
    world.insert(cache, "ab", [20, 21], "other")
    seen = set()
    pages: list[int] = []
    for node in cache.nodes():
        equal("a parent comes before its children", node.parent is None or id(node.parent) in seen, True)
        equal("tokens of a node", node.tokens.shape, (node.num_pages * world.page_size,))
        seen.add(id(node))
        pages += node.pages.tolist()
    equal("pages of all nodes", sorted(pages), [10, 11, 12, 13, 20, 21])


LOOKUP_CHECKS: list[Check] = [
    _match_finds_the_longest_prefix,
    _match_rounds_down_to_whole_pages,
    _pages_that_differ_in_one_token_are_two,
    _equal_pages_behind_other_tokens_are_two,
    _insert_rounds_down_to_whole_pages,
    _empty_input_is_no_error,
    _insert_keeps_what_is_there,
    _insert_of_what_is_there_adds_nothing,
    _only_new_adds_nothing_behind_what_is_there,
    _extend_is_insert_from_there_on,
    _extend_page_by_page_is_one_prefix,
    _a_prompt_of_many_parts_needs_no_recursion,
    _token_ids_come_in_many_forms,
    _arrays_of_the_caller_are_copied,
    _results_are_copies,
    _namespaces_do_not_see_each_other,
    _namespace_without_pages_leaves_nothing,
    _holds_tells_the_pages_in_the_cache,
    _nodes_tell_all_that_is_held,
]
