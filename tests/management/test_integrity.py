"""Each sentence can be broken, and is then the one that is named."""

import numpy as np
import pytest

from pagedkv import IntegrityError, KVCacheManager, RadixCache, check_integrity


class DoctoredCache:
    """A prefix cache whose nodes, as it shows them, can be changed; what it does is the real cache's."""

    def __init__(self, page_size):
        self._real = RadixCache(page_size)
        self.doctor = lambda nodes: nodes
        self.answers = {}

    def __getattr__(self, name):
        answers = self.__dict__.get("answers", {})
        return answers[name] if name in answers else getattr(self._real, name)

    def nodes(self):
        copies = {}
        for node in self._real.nodes():
            copies[id(node)] = Node(node, copies.get(id(node.parent)))
        return iter(self.doctor(list(copies.values())))


class Node:
    """A copy of what a node shows."""

    def __init__(self, node, parent):
        for name in ("num_pages", "locks", "anchors", "namespace"):
            setattr(self, name, getattr(node, name))
        self.pages, self.tokens, self.parent = node.pages.copy(), node.tokens.copy(), parent


def make_manager():
    """Page 1 is published and named, page 2 is half full and named, page 3 is cached alone and pinned, page 4 shared by
    a fork, page 5 given back by a window, page 0 reserved; the rest is free. A step over the first one was made."""
    manager = KVCacheManager(9, page_size=2, prefix_cache=DoctoredCache(2), num_reserved_pages=1)
    seq = manager.open([])
    seq.append(3)
    seq.commit([1, 2, 3])
    other = manager.open([])
    other.append(2)
    other.commit([7, 8])
    other.close()
    manager.pin([7, 8])
    manager.open([]).append(1)
    list(manager.ledger.live.values())[1].fork()
    windowed = manager.open([], window=1)
    windowed.append(3)
    windowed.commit([5, 6, 5])
    manager.batch([seq])
    manager.drop(windowed.fork())
    return manager, seq


def sequences(manager):
    return list(manager.ledger.live.values())


def node_of(page, change):
    """A doctor that changes the node of `page`."""

    def doctor(nodes):
        change(next(node for node in nodes if page in node.pages))
        return nodes

    return doctor


def list_a_page_twice(manager, seq):
    manager.ledger.allocator._free_stack[0] = manager.ledger.allocator._free_stack[1]


def free_an_owned_page(manager, seq):
    manager.ledger.allocator._num_free += 1
    manager.ledger.allocator._free_stack[manager.ledger.allocator._num_free - 1] = 2


def lose_a_page(manager, seq):
    manager.ledger.allocator._num_free -= 1


def give_an_owner_too_many(manager, seq):
    manager.ledger.allocator._num_owners[2] += 1
    manager.ledger.allocator._num_extra_owners += 1


def count_extra_owners_wrong(manager, seq):
    manager.ledger.allocator._num_extra_owners += 1


def lose_the_owner_of_a_reserved_page(manager, seq):
    manager.ledger.allocator._num_owners[0] = 2
    manager.ledger.allocator._num_extra_owners += 1


def go_below_zero(manager, seq):
    manager.ledger.allocator._num_owners[2] = -1


def wait_for_a_copy_that_is_not_there(manager, seq):
    manager.budget.copy_sources[2] += 1


def rename(manager, seq, at, page):
    manager.ledger.rows.pages.put(seq._row, at, np.array([page], np.int32))


def drop_a_page_of_the_sequence(manager, seq):
    manager.ledger.rows.pages.truncate(seq._row, 1)


def name_a_page_twice(manager, seq):
    rename(manager, seq, 1, 1)


def name_a_page_outside(manager, seq):
    rename(manager, seq, 1, 9)


def name_a_free_page(manager, seq):
    rename(manager, seq, 1, 8)


def name_a_reserved_page(manager, seq):
    rename(manager, seq, 1, 0)


def name_another_page_than_the_table(manager, seq):
    manager._planner._table.snapshot.read()[1][1] = 7


def count_tokens_wrong(manager, seq):
    manager.ledger.rows.num_tokens[seq._row] = 5


def cached_more_than_committed(manager, seq):
    seq._num_cached_tokens = 4


def give_back_what_no_window_allows(manager, seq):
    rename(manager, seq, 0, -1)


def give_back_too_early(manager, seq):
    windowed = sequences(manager)[3]
    rename(manager, windowed, 1, -1)
    manager.ledger.rows.first_page[windowed._row] = 2


def name_a_page_while_away(manager, seq):
    manager.ledger.rows.pages.extend(sequences(manager)[4]._row, np.array([8], np.int32))


def forget_a_sequence(manager, seq):
    manager.ledger.live.clear()


def forget_a_pin(manager, seq):
    manager.ledger.pins.clear()


def put_a_page_in_two_places(manager, seq):
    manager.ledger.cache.doctor = node_of(3, lambda node: node.pages.__setitem__(0, 1))


def lengthen_a_run_of_tokens(manager, seq):
    manager.ledger.cache.doctor = node_of(3, lambda node: setattr(node, "tokens", np.append(node.tokens, 9)))


def begin_like_the_node_beside_it(manager, seq):
    manager.ledger.cache.doctor = node_of(3, lambda node: node.tokens.__setitem__(slice(None), [1, 2]))


def change_the_locked_tokens(manager, seq):
    manager.ledger.rows.tokens.put(seq._row, 0, np.array([9], np.int32))


def change_the_tokens_of_a_node(manager, seq):
    manager.ledger.cache.doctor = node_of(1, lambda node: node.tokens.__setitem__(1, 9))


def rename_a_pinned_page(manager, seq):
    (pin,) = manager.ledger.pins.values()
    pin._pages[0] = 8


def drop_the_lock(manager, seq):
    manager.ledger.cache.unlock(seq.lock_handle)


def lock_once_more(manager, seq):
    manager.ledger.cache.lock(seq.lock_handle)


def lock_too_little(manager, seq):
    seq._move_lock(None)


def count_evictable_wrong(manager, seq):
    manager.ledger.cache.answers["num_evictable_pages"] = 1


def count_cached_wrong(manager, seq):
    manager.ledger.cache.answers["num_cached_pages"] = 1


def forget_that_a_page_is_held(manager, seq):
    mask = manager.ledger.cache.held_mask(9)
    mask[3] = False
    manager.ledger.cache.answers["held_mask"] = lambda num_pages: mask


@pytest.mark.parametrize(
    "break_it, message",
    [
        (list_a_page_twice, "on the free list once or has an owner, never both: page 7 is on the free list 2 times"),
        (free_an_owned_page, "never both: page 2 is on the free list and has 1 owners"),
        (lose_a_page, "never both: page 5 has no owner and is not on the free list"),
        (go_below_zero, "never both: page 2 has -1 owners"),
        (count_extra_owners_wrong, "never both: 2 owners beyond the first are counted, 1 are there"),
        (drop_a_page_of_the_sequence, r"has as many pages as its tokens need.*needs 2 pages and has 1"),
        (count_tokens_wrong, r"has as many pages as its tokens need.*needs 3 pages and has 2"),
        (cached_more_than_committed, "has as many pages as its tokens need.*has 4 cached tokens"),
        (name_a_page_twice, r"names no page twice.*names \[1, 1\]"),
        (name_a_page_outside, r"names \[9\], outside 0..8"),
        (give_back_what_no_window_allows, r"names no page twice.*has given back 0 pages and names \[-1, 2\]"),
        (give_back_too_early, "has given back 2 pages, and its next token sees all from position 3"),
        (name_a_page_while_away, "a sequence that is away names no page and locks nothing"),
        (name_a_free_page, r"no live sequence names a free or reserved page.*names \[8\]"),
        (name_a_reserved_page, r"no live sequence names a free or reserved page.*names \[0\]"),
        (lengthen_a_run_of_tokens, "has whole pages.*a node of 1 pages holds 1 pages and 3 tokens"),
        (begin_like_the_node_beside_it, r"begins with the same page: the node of pages \[[13]\] is the second"),
        (put_a_page_in_two_places, "no page is at two positions of the prefix cache: page 1 is at 2"),
        (drop_the_lock, r"every lock of the prefix cache is held by .*: the node of pages \[1\]"),
        (lock_once_more, r"every lock of the prefix cache is held by .*: the node of pages \[1\]"),
        (forget_a_sequence, r"every lock of the prefix cache is held by .*: the node of pages \[1\]"),
        (forget_a_pin, r"every lock of the prefix cache is held by .*: the node of pages \[3\]"),
        (change_the_tokens_of_a_node, "every lock of the prefix cache .* locks 2 tokens that are not in the cache"),
        (count_evictable_wrong, "the cache counts what its nodes hold: 1 counted as evictable, 0 are"),
        (count_cached_wrong, "the cache counts what its nodes hold: 1 counted, 2 held"),
        (
            forget_that_a_page_is_held,
            "the cache counts what its nodes hold: page 3 is not in a node|page 3 is in a node",
        ),
        (
            give_an_owner_too_many,
            "and else as many as live sequences name it.*page 2 has 2 owners, 1 sequences name it",
        ),
        (lose_the_owner_of_a_reserved_page, "page 0 has 2 owners, 0 sequences name it"),
        (wait_for_a_copy_that_is_not_there, "page 2 has 1 owners, 1 sequences name it, .* and 1 copies wait for it"),
        (lock_too_little, "locks the cached pages it names.*names page 1 at 0, which is not locked there"),
        (change_the_locked_tokens, "locks the cached pages it names.*locks other tokens than it committed"),
        (rename_a_pinned_page, r"a pin locks the pages it names: .* names \(8,\), not \[3\]"),
        (name_another_page_than_the_table, r"the table of the last step .* has \[1, 2\], not \[1, 7\]"),
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
    manager.ledger.allocator._num_extra_owners = 1
    with pytest.raises(IntegrityError, match="page 0 has 2 owners"):
        manager.stats()
    with pytest.raises(IntegrityError, match="page 0 has 2 owners"):
        seq.can_append(1)


def test_sound_manager_returns_none():
    assert check_integrity(make_manager()[0]) is None
