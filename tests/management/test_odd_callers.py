"""What tiers, policies, forks and finalizers may do to a manager, and what comes of it: found by attacking it."""

import gc
import math

import numpy as np
import pytest
import torch

from pagedkv import KVCacheManager, OutOfPagesError, TierError, check_integrity
from pagedkv.management import AllBlocksCleared, BlockRemoved, BlockStored


class Tier:
    """Keeps page ids, and does what it is told before each call."""

    def __init__(self, before=lambda call: None):
        self.saved, self.before = {}, before

    def save(self, pages):
        self.before("save")
        self.saved[len(self.saved)] = pages.tolist()
        return len(self.saved) - 1

    def load(self, ticket, pages):
        self.before("load")

    def drop(self, ticket):
        self.before("drop")
        del self.saved[ticket]


def grow(manager, ids, namespace=None):
    seq = manager.open(ids, namespace)
    if len(ids) > seq.num_tokens:
        seq.append(len(ids) - seq.num_tokens)
        seq.commit(ids[seq.num_committed :])
    return seq


@pytest.mark.parametrize("where", ["save", "load", "drop"])
def test_a_tier_may_close_what_it_is_asked_about_after_the_call(where):
    tier = Tier()
    manager = KVCacheManager(8, page_size=2, tier=tier, prefix_cache=False)
    seq = grow(manager, [1, 2, 3])
    tier.before = lambda call: seq.close() if call == where else None
    manager.swap_out(seq)
    if not seq.is_closed:
        manager.swap_in(seq)
    assert seq.is_closed
    check_integrity(manager)
    assert manager.num_free_pages == 8
    assert not tier.saved


def test_a_tier_may_look_but_not_change():
    tier = Tier()
    manager = KVCacheManager(8, page_size=2, tier=tier)
    seq = grow(manager, [1, 2, 3])
    tier.before = lambda call: manager.stats() and manager.can_append(1) and seq.can_append(1)
    manager.swap_out(seq)
    tier.before = lambda call: manager.evict()
    with pytest.raises(ValueError, match="evict must not be called inside another call of the manager"):
        manager.swap_in(seq)
    assert seq.state == "swapped out"
    check_integrity(manager)


def test_sequences_that_the_collector_closes_in_a_call_are_closed_after_it():
    class Owner:
        def __init__(self, seq):
            self.seq, self.me = seq, self

        def __del__(self):
            self.seq.close()

    tier = Tier(lambda call: gc.collect())
    manager = KVCacheManager(20, page_size=2, tier=tier)
    for _ in range(5):
        Owner(grow(manager, [7, 7, 7]))
        manager.swap_out(grow(manager, [1, 2, 3]))
        check_integrity(manager)
    assert manager.stats().num_sequences == 5


def test_a_tier_without_memory_changes_nothing():
    def fail(call):
        raise MemoryError("no host memory")

    manager = KVCacheManager(8, page_size=2, tier=Tier(fail))
    grow(manager, [5, 6]).close()
    pin, seq = manager.pin([5, 6]), grow(manager, [1, 2, 3])
    with pytest.raises(TierError, match="the tier must have memory for 2 pages: no host memory"):
        manager.swap_out(seq)
    assert (seq.state, pin.num_tokens, manager.stats().published) == ("on pages", 2, 2)


def test_a_copy_that_the_tier_does_not_let_go_of_is_dropped_later():
    busy = ["drop"]

    def be_busy(call):
        if call in busy:
            raise OSError("busy")

    tier = Tier(be_busy)
    manager = KVCacheManager(8, page_size=2, tier=tier)
    seq = grow(manager, [1, 2, 3])
    manager.swap_out(seq)
    assert manager.swap_in(seq).tolist() == []
    assert (seq.state, len(tier.saved)) == ("on pages", 1)
    with pytest.raises(OSError, match="busy"):
        manager.swap_out(seq)
    assert seq.state == "on pages"
    busy.clear()
    seq.close()
    assert not tier.saved


def test_pages_that_come_back_from_a_tier_are_not_copied_over():
    manager = KVCacheManager(8, page_size=4, prefix_cache=False, tier=Tier())
    away = grow(manager, [1, 2, 3, 4])
    manager.swap_out(away)
    seq = grow(manager, [7, 8])
    fork = seq.fork()
    fork.append(1)
    copied_to = fork.page_ids
    fork.close()
    manager.swap_in(away)
    assert away.page_ids == copied_to
    _, dst = manager.take_copies()
    assert not set(dst.tolist()) & set(away.page_ids)
    check_integrity(manager)


def test_copies_of_copies_are_kept_when_the_page_between_is_taken():
    manager = KVCacheManager(8, page_size=4, prefix_cache=False, tier=Tier())
    away = grow(manager, [1, 2, 3, 4])
    manager.swap_out(away)
    seq = grow(manager, [7, 8])
    fork = seq.fork()
    fork.append(1)
    second = fork.fork()
    second.append(1)
    first_page, between, last = seq.page_ids + fork.page_ids + second.page_ids
    fork.close()
    manager.swap_in(away)
    src, dst = manager.take_copies()
    pairs = dict(zip(dst.tolist(), src.tolist(), strict=True))
    assert pairs[last] == first_page
    assert away.page_ids[0] not in pairs
    assert between in (away.page_ids[0], *manager.budget.allocator.free_pages().tolist())
    check_integrity(manager)


@pytest.mark.parametrize("cache", ["radix", "hashed"])
def test_forks_that_committed_different_tokens_for_a_page_cannot_fill_it(cache):
    manager = KVCacheManager(12, page_size=4, prefix_cache=cache)
    first = manager.open([])
    first.append(4)
    second = first.fork()
    manager.commit([first, second], [1, 2])
    with pytest.raises(ValueError, match="must be those that a fork committed for the same pages, got 1 instead of 2"):
        first.commit([5, 6, 7])
    assert first.token_ids == (1,)
    first.commit([5])
    second.commit([5, 6])
    with pytest.raises(ValueError, match="must be those that a fork committed for the same pages"):
        manager.commit([first], [6]) or manager.commit([first], [7])
    check_integrity(manager)


class Moody:
    """A policy whose answers are what they are told to be."""

    answer = None

    def priority(self, run):
        if callable(self.answer):
            return self.answer(run)
        return (run.last_access,) if self.answer is None else self.answer


ANSWERS = {
    "NaN": lambda run, count=[0]: (math.nan,),
    "another each time": lambda run, count=[0]: (count.__setitem__(0, count[0] + 1), (count[0],))[1],
    "another length each time": lambda run, count=[0]: (count.__setitem__(0, count[0] + 1), (1,) * (count[0] % 4))[1],
    "words": ("first",),
    "none": 5,
    "arrays": (np.zeros(3),),
    "an error": lambda run: 1 // 0,
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("options", [{}, {"prefix_cache": "hashed"}, {"window": 5}, {"namespace_limits": {"a": 3}}])
def test_policies_that_answer_nonsense_leave_the_books_whole(options, answer):
    policy = Moody()
    manager = KVCacheManager(12, page_size=2, eviction=policy, **options)
    grow(manager, [1, 2, 3, 4], "a").close()
    policy.answer = ANSWERS[answer]
    for number in range(30):
        try:
            seq = grow(manager, [number % 5, 2, number % 3, 4, 5][: number % 6], "a" if number % 2 else None)
            seq.fork().close()
            seq.close()
        except (OutOfPagesError, TypeError, ValueError, ZeroDivisionError):
            pass
        check_integrity(manager)
    policy.answer = None
    for seq in list(manager.ledger.live.values()):
        seq.close()
    for _ in range(30):
        manager.evict()
    assert manager.num_free_pages == 12


def test_beams_that_cannot_be_closed_leave_no_forks():
    policy = Moody()
    manager = KVCacheManager(20, page_size=2, prefix_cache="hashed", eviction=policy, namespace_limits={"a": 3})
    grow(manager, [9, 9, 8, 8], "a").close()
    first, second = manager.open([], "a"), manager.open([], "a")
    for seq in (first, second):
        seq.append(6)
        seq.commit([1, 2, 3, 4])
    before = manager.stats().num_sequences
    policy.answer = ANSWERS["an error"]
    try:
        manager.reorder([first, second], [0, 0, 0])
    except ZeroDivisionError:
        assert manager.stats().num_sequences <= before
    check_integrity(manager)


def test_when_one_cache_starts_over_a_reader_of_all_does():
    manager = KVCacheManager(20, page_size=2, namespace_limits={"a": 5}, events=True)
    grow(manager, [1, 2, 3, 4])
    grow(manager, [5, 6], "a").close()
    held = set()

    def read():
        for event in manager.take_events():
            if isinstance(event, AllBlocksCleared):
                held.clear()
            elif isinstance(event, BlockStored):
                held.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                held.difference_update(event.block_hashes)

    read()
    assert len(held) == 3
    next(iter(manager.ledger.limited.values()))[0].events.resync()
    grow(manager, [7, 8])
    read()
    assert len(held) == manager.stats().published == 4


def test_a_page_that_waits_for_its_copy_and_is_not_cached_is_no_loss():
    manager = KVCacheManager(3, page_size=2)
    grow(manager, [1, 2]).close()
    seq = grow(manager, [5])
    fork = seq.fork()
    fork.append(1)
    seq.close()
    assert (manager.num_free_pages, manager.num_evictable_pages) == (0, 1)
    assert manager.can_append(1)
    assert torch.is_tensor(manager.open([9]).append(1))
    check_integrity(manager)


def test_the_dense_table_is_of_its_step_or_refused():
    manager = KVCacheManager(200, page_size=2)
    first, second = grow(manager, [1, 2, 3]), grow(manager, [4])
    step = manager.batch([first, second])
    second.close()
    manager.open([]).append(4)
    with pytest.raises(ValueError, match="the dense table must be asked for before its sequences change"):
        step.dense_table()
    step = manager.batch([first])
    kept = step.dense_table().tolist()
    first.append(100)
    assert step.dense_table().tolist() == kept
