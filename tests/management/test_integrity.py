"""Each sentence can be broken, and is then the one that is named."""

import numpy as np
import pytest

from pagedkv import IntegrityError, KVCacheManager, check_integrity


def make_manager():
    """Page 0 is published and named, page 1 is half full and named, page 2 is in the cache alone, the rest is free."""
    manager = KVCacheManager(6, page_size=2)
    seq = manager.open([])
    seq.append(3)
    seq.commit([1, 2, 3])
    other = manager.open([])
    other.append(2)
    other.commit([7, 8])
    other.close()
    return manager, seq


def nodes(manager):
    return {int(node.pages[0]): node for node in manager.ledger.cache.nodes() if node.parent is not None}


def list_a_page_twice(manager, seq):
    manager.ledger.allocator._free_stack[0] = manager.ledger.allocator._free_stack[1]


def free_an_owned_page(manager, seq):
    manager.ledger.allocator._num_free += 1
    manager.ledger.allocator._free_stack[manager.ledger.allocator._num_free - 1] = 1


def lose_a_page(manager, seq):
    manager.ledger.allocator._num_free -= 1


def give_an_owner_too_many(manager, seq):
    manager.ledger.allocator._num_owners[1] += 1


def go_below_zero(manager, seq):
    manager.ledger.allocator._num_owners[1] = -1


def drop_a_page_of_the_sequence(manager, seq):
    seq._pages.truncate(1)


def name_a_page_twice(manager, seq):
    seq._pages.put(1, np.array([0], np.int32))


def name_a_page_outside(manager, seq):
    seq._pages.put(1, np.array([6], np.int32))


def name_a_free_page(manager, seq):
    seq._pages.put(1, np.array([5], np.int32))


def count_tokens_wrong(manager, seq):
    seq._num_tokens = 5


def forget_a_sequence(manager, seq):
    manager.ledger.live.clear()


def put_a_page_in_two_places(manager, seq):
    nodes(manager)[2]._pages.put(0, np.array([0], np.int32))


def lengthen_a_run_of_tokens(manager, seq):
    nodes(manager)[2]._tokens.extend(np.array([9], np.int64))


def change_tokens_under_the_key(manager, seq):
    nodes(manager)[2]._tokens.put(0, np.array([9], np.int64))


def change_the_locked_tokens(manager, seq):
    seq._tokens.put(0, np.array([9], np.int64))


def drop_the_lock(manager, seq):
    manager.ledger.cache.unlock(seq.lock_handle)


def lock_once_more(manager, seq):
    manager.ledger.cache.lock(seq.lock_handle)


def lock_too_little(manager, seq):
    seq._move_lock(None)


def use_a_child_later(manager, seq):
    nodes(manager)[2].last_access += 100


def drop_from_the_queue(manager, seq):
    manager.ledger.cache._queue.clear()


def count_evictable_wrong(manager, seq):
    manager.ledger.cache._num_evictable_pages += 1


def count_cached_wrong(manager, seq):
    manager.ledger.cache._num_cached_pages -= 1


def forget_that_a_page_is_held(manager, seq):
    manager.ledger.cache._held[2] = 0


@pytest.mark.parametrize(
    "break_it, message",
    [
        (list_a_page_twice, "on the free list once or has an owner, never both: page 4 is on the free list 2 times"),
        (free_an_owned_page, "never both: page 1 is on the free list and has 1 owners"),
        (lose_a_page, "never both: page 3 has no owner and is not on the free list"),
        (go_below_zero, "never both: page 1 has -1 owners"),
        (drop_a_page_of_the_sequence, r"has as many pages as its tokens need.*needs 2 pages and has 1"),
        (count_tokens_wrong, r"has as many pages as its tokens need.*needs 3 pages and has 2"),
        (name_a_page_twice, r"names no page twice.*names \[0, 0\]"),
        (name_a_page_outside, r"names \[6\], outside 0..5"),
        (name_a_free_page, r"no live sequence names a free page.*names \[5\]"),
        (lengthen_a_run_of_tokens, "has whole pages.*a node of 1 pages holds 1 pages and 3 tokens"),
        (change_tokens_under_the_key, r"files it under its first page: the node of pages \[2\] is filed wrongly"),
        (put_a_page_in_two_places, "no page is at two positions of the radix tree: page 0 is at 2"),
        (drop_the_lock, r"every lock of the radix tree is held by a live sequence: the node of pages \[0\]"),
        (lock_once_more, r"every lock of the radix tree is held by a live sequence: the node of pages \[0\]"),
        (use_a_child_later, "a node is not used later than its parent"),
        (drop_from_the_queue, "every evictable node is in the eviction queue"),
        (count_evictable_wrong, "the cache counts what its nodes hold: 2 counted as evictable, 1 are"),
        (count_cached_wrong, "the cache counts what its nodes hold: 1 counted, 2 held"),
        (forget_that_a_page_is_held, "the cache counts what its nodes hold: page 2"),
        (give_an_owner_too_many, "as many owners as live sequences name it.*page 1 has 2 owners, 1 sequences name it"),
        (forget_a_sequence, "every lock of the radix tree is held by a live sequence"),
        (lock_too_little, "locks the cached pages it names.*names page 0 at 0, which is not locked there"),
        (change_the_locked_tokens, "locks the cached pages it names.*locks other tokens than it committed"),
    ],
    ids=lambda value: getattr(value, "__name__", "named"),
)
def test_broken_sentence_is_named(break_it, message):
    manager, seq = make_manager()
    check_integrity(manager)
    break_it(manager, seq)
    with pytest.raises(IntegrityError, match=f"broken: .*{message}"):
        check_integrity(manager)


def test_debug_checks_after_every_public_call():
    manager = KVCacheManager(4, page_size=2, debug=True)
    seq = manager.open([])
    seq.append(1)
    manager.ledger.allocator._num_owners[0] = 2
    with pytest.raises(IntegrityError, match="page 0 has 2 owners"):
        manager.stats()
    with pytest.raises(IntegrityError, match="page 0 has 2 owners"):
        seq.can_append(1)


def test_sound_manager_returns_none():
    assert check_integrity(make_manager()[0]) is None
