"""Each sentence about the tree can be broken, and is then the one that is named."""

import numpy as np
import pytest

from pagedkv import IntegrityError, RadixCache


def make_cache():
    """[1 2 | 3 4] on pages 0 1, locked, and a branch [1 2 | 5 6] on 0 2."""
    cache = RadixCache(2, core="python")
    cache.lock(cache.insert([1, 2, 3, 4], [0, 1]).handle)
    cache.insert([1, 2, 5, 6], [0, 2])
    cache.sanity_check()
    return cache


def node(cache, page):
    return next(one for one in cache.nodes() if page in one.pages)


def drop_a_token(cache):
    node(cache, 2)._tokens.truncate(1)


def change_the_first_page(cache):
    node(cache, 2)._tokens.put(0, np.array([9], np.int64))


def name_a_page_twice(cache):
    node(cache, 2)._pages.put(0, np.array([1], np.int32))


def lose_locks_in_a_split(cache):
    node(cache, 0).locks = 0


def lock_below_zero(cache):
    node(cache, 2).locks = node(cache, 2).anchors = -1


def use_a_child_later(cache):
    node(cache, 2).last_access += 100


def drop_from_the_queue(cache):
    cache._tree._queue.clear()


def count_wrong(cache):
    cache._tree.num_cached_pages += 1


def count_evictable_wrong(cache):
    cache._tree.num_evictable_pages += 1


def forget_a_page(cache):
    cache._tree._held[2] = 0


def count_the_pages_before_wrong(cache):
    node(cache, 2).num_before = 2


def forget_a_namespace(cache):
    cache._tree.roots.clear()


def have_two_roots_for_one_namespace(cache):
    cache._tree.insert(cache._tree.add_root(None), [9, 9], [9], False, 0)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (drop_a_token, "a node has whole pages.*a node of 1 pages holds 1 pages and 1 tokens"),
        (change_the_first_page, r"a node .* files it under its first page: the node of pages \[2\] is filed wrongly"),
        (count_the_pages_before_wrong, r"a node knows how many pages are before it: .*pages \[2\] says 2, 1 are"),
        (forget_a_namespace, "every namespace has one root: 1 roots of 1 namespaces, 1 unknown"),
        (have_two_roots_for_one_namespace, "every namespace has one root: 2 roots of 1 namespaces, 0 unknown"),
        (name_a_page_twice, "no page is at two positions of the tree: 1 are"),
        (lose_locks_in_a_split, r"a node is locked as often as.*pages \[0\] has 0 locks, 0 of them by name.*have 1"),
        (lock_below_zero, r"a node is locked as often as .*"),
        (use_a_child_later, r"a node is not used later than its parent: the node of pages \[2\] is"),
        (
            drop_from_the_queue,
            r"the queue holds the evictable nodes and no others: the node of pages \[2\] is not in it",
        ),
        (count_wrong, "the counters say what the nodes hold: 4 pages counted, 3 held"),
        (count_evictable_wrong, "the counters say what the nodes hold: 2 pages counted as evictable, 1 are"),
        (forget_a_page, "the counters say what the nodes hold: 2 pages are marked as held, 3 are"),
    ],
    ids=lambda value: getattr(value, "__name__", "named"),
)
def test_broken_sentence_is_named(break_it, message):
    cache = make_cache()
    break_it(cache)
    with pytest.raises(IntegrityError, match=f"broken: {message}"):
        cache.sanity_check()


@pytest.mark.native
def test_the_native_core_is_read_not_believed():
    """Nothing can be broken in it from here; what it says of itself is asked for."""
    cache = RadixCache(2, core="native")
    cache.insert([1, 2], [0])
    cache.sanity_check()
    cache._tree._calls["defect"] = lambda: "the queue must be in order"
    with pytest.raises(IntegrityError, match="broken: the queue must be in order: the native core says so"):
        cache.sanity_check()
