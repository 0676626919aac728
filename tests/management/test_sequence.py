import copy
import pickle

import pytest
import torch

from pagedkv import KVCacheManager, KVCacheSpec, KVPool, OutOfPagesError, check_integrity


def make_manager(num_pages=10, page_size=4, **options):
    return KVCacheManager(num_pages, page_size=page_size, debug=True, **options)


def opened(manager, tokens, namespace=None):
    """A sequence with all of `tokens` committed."""
    seq = manager.open(tokens, namespace)
    if len(tokens) > seq.num_tokens:
        seq.append(len(tokens) - seq.num_tokens)
        seq.commit(tokens)
    return seq


def test_append_gives_slots_page_after_page():
    manager = make_manager()
    other = manager.open([])
    seq = manager.open([])
    assert seq.append(3).tolist() == [0, 1, 2]
    assert other.append(1).tolist() == [4]
    slots = seq.append(6)
    assert slots.tolist() == [3, 8, 9, 10, 11, 12]
    assert slots.dtype == torch.int64
    assert seq.page_ids == (0, 2, 3)
    assert (seq.num_tokens, seq.num_committed) == (9, 0)


def test_append_fills_the_page_before_it_takes_one():
    manager = make_manager(num_pages=1)
    seq = manager.open([])
    assert seq.append(1).tolist() == [0]
    assert seq.append(3).tolist() == [1, 2, 3]
    with pytest.raises(OutOfPagesError, match="cannot allocate 1 page: 0 free, 0 evictable, 1 pinned by 1 sequence"):
        seq.append(1)


def test_prompt_longer_than_the_pool_changes_nothing():
    manager = make_manager(num_pages=3)
    cached = opened(manager, [1] * 4)
    cached.close()
    seq = manager.open([2] * 100)
    with pytest.raises(OutOfPagesError) as raised:
        seq.append(100)
    assert (raised.value.needed, raised.value.free, raised.value.evictable) == (25, 2, 1)
    assert seq.page_ids == ()
    assert manager.open([1] * 4).num_cached_tokens == 4
    assert seq.append(8).shape == (8,)


def test_try_append_and_can_append_agree_with_append():
    manager = make_manager(num_pages=2)
    seq = manager.open([])
    assert seq.can_append(8)
    assert not seq.can_append(9)
    assert seq.try_append(9) is None
    assert seq.num_tokens == 0
    assert seq.try_append(8).tolist() == list(range(8))
    assert not seq.can_append(1)


@pytest.mark.parametrize("call", ["append", "try_append", "can_append"])
@pytest.mark.parametrize("num_tokens, error", [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_number_of_tokens_is_checked(call, num_tokens, error):
    seq = make_manager().open([])
    with pytest.raises(error, match="num_tokens must be"):
        getattr(seq, call)(num_tokens)


def test_commit_in_parts_and_as_a_whole():
    manager = make_manager()
    seq = manager.open([])
    seq.append(6)
    seq.commit([1, 2])
    seq.commit(torch.tensor([3, 4, 5]))
    assert (seq.token_ids, manager.stats().published) == ((1, 2, 3, 4, 5), 1)
    seq.append(3)
    seq.commit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (seq.num_committed, manager.stats().published) == (9, 2)
    seq.commit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert seq.token_ids == (1, 2, 3, 4, 5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    "token_ids, message",
    [
        ([], "must be the next 1..3 ids or all 8 of the sequence, got 0 ids"),
        ([6, 7, 8, 9], "must be the next 1..3 ids or all 8 of the sequence, got 4 ids"),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], "got 9 ids"),
        ([1, 2, 9, 4, 5, 6, 7, 8], "must begin with the committed ids, got 9 instead of 3 at position 2"),
        ([-1], "must be 0 or more, got -1 at position 0"),
    ],
)
def test_commit_of_other_tokens_changes_nothing(token_ids, message):
    seq = opened(make_manager(), [1, 2, 3, 4, 5])
    seq.append(3)
    with pytest.raises(ValueError, match=message):
        seq.commit(token_ids)
    assert seq.token_ids == (1, 2, 3, 4, 5)
    seq.commit([6, 7, 8])


def test_commit_with_nothing_pending():
    seq = make_manager().open([])
    with pytest.raises(ValueError, match=r"must be no more ids \(append first\) or all 0 of the sequence, got 1 ids"):
        seq.commit([1])


def test_commit_keeps_no_view_of_the_caller():
    manager = make_manager()
    seq = manager.open([])
    seq.append(4)
    tokens = torch.tensor([1, 2, 3, 4])
    seq.commit(tokens)
    tokens[:] = 9
    assert seq.token_ids == (1, 2, 3, 4)
    assert manager.open([1, 2, 3, 4]).num_cached_tokens == 4


def test_equal_tokens_of_two_open_sequences_stay_on_their_own_pages():
    """The cache keeps the first ones; the duplicates belong to the second sequence until it closes."""
    manager = make_manager()
    first, second = manager.open([1] * 9), manager.open([1] * 9)
    first.append(9), second.append(9)
    first.commit([1] * 9)
    second.commit([1] * 9)
    assert first.page_ids == (0, 1, 2)
    assert second.page_ids == (3, 4, 5)
    assert (manager.stats().published, manager.num_free_pages) == (2, 4)
    # Whatever is handed out now is none of the duplicates that a live sequence names.
    others = [manager.open([]) for _ in range(4)]
    given = {int(other.append(1)) // 4 for other in others}
    assert given == {6, 7, 8, 9}
    second.append(3)
    second.commit([1] * 12)
    assert second.page_ids == (3, 4, 5)
    # A page behind duplicates waits for the close: the lock on it would pin the cache's own pages.
    assert manager.stats().published == 2
    first.close()
    assert manager.num_evictable_pages == 2
    assert second.page_ids == (3, 4, 5)
    second.close()
    assert manager.num_free_pages == 3
    assert manager.open([1] * 12).page_ids == (0, 1, 5)


def test_duplicates_are_published_once_the_cache_dropped_its_own():
    manager = make_manager()
    first, second = manager.open([]), manager.open([])
    first.append(4), second.append(8)
    first.commit([1] * 4)
    second.commit([1] * 4)
    first.close()
    assert manager.evict() == 1
    second.commit([1] * 4)
    assert manager.open([1] * 8).page_ids == second.page_ids


def test_fork_shares_all_pages_and_the_first_to_append_copies():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4, 5, 6])
    child = seq.fork()
    assert child.page_ids == seq.page_ids == (0, 1)
    assert (child.token_ids, child.num_cached_tokens) == (seq.token_ids, 0)
    assert child.append(1).tolist() == [10]
    assert [pages.tolist() for pages in manager.take_copies()] == [[1], [2]]
    assert (seq.page_ids, child.page_ids) == ((0, 1), (0, 2))
    # The parent is alone on its page now.
    assert seq.append(1).tolist() == [6]
    assert [pages.tolist() for pages in manager.take_copies()] == [[], []]
    assert manager.stats().shared == 1


def test_fork_at_a_full_page_copies_nothing():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4])
    child = seq.fork()
    assert child.append(1).tolist() == [4]
    assert manager.stats().copied_pages == 0


def test_fork_survives_its_parent():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4, 5])
    child = seq.fork()
    seq.close()
    assert child.page_ids == (0, 1)
    assert child.append(1).tolist() == [5]
    child.close()
    assert manager.stats().owned == 0


def test_pages_that_a_fork_publishes_are_locked_for_all_that_name_them():
    manager = make_manager(num_pages=3)
    seq = manager.open([])
    seq.append(8)
    child = seq.fork()
    seq.commit([1] * 8)
    seq.close()
    assert manager.num_evictable_pages == 0
    with pytest.raises(OutOfPagesError):
        manager.open([]).append(8)
    with pytest.raises(
        ValueError, match="must be those that a fork committed for the same pages, got 2 instead of 1 at"
    ):
        child.commit([1, 1, 2])
    child.commit([1] * 8)
    child.close()
    assert manager.num_evictable_pages == 2


def test_append_with_copy_needs_a_page_more_and_takes_all_or_none():
    manager = make_manager(num_pages=3)
    seq = opened(manager, [1, 2, 3, 4, 5])
    child = seq.fork()
    assert not child.can_append(4)
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 1 free"):
        child.append(4)
    assert child.page_ids == seq.page_ids
    assert manager.stats().copied_pages == 0
    assert child.append(3).tolist() == [9, 10, 11]


def test_truncate_gives_pages_back_and_drops_pending_tokens_first():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4, 5, 6])
    seq.append(7)
    seq.truncate(7)
    assert (seq.num_tokens, seq.num_committed, seq.page_ids) == (7, 6, (0, 1))
    seq.truncate(6)
    assert seq.num_committed == 6
    seq.truncate(5)
    assert seq.token_ids == (1, 2, 3, 4, 5)
    assert seq.append(1).tolist() == [5]
    assert manager.stats().copied_pages == 0


def test_append_after_truncate_into_a_published_page_copies_it():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    seq.truncate(6)
    assert seq.page_ids == (0, 1)
    assert manager.num_evictable_pages == 0
    assert seq.append(1).tolist() == [10]
    assert [pages.tolist() for pages in manager.take_copies()] == [[1], [2]]
    assert manager.num_evictable_pages == 1
    seq.commit([9])
    assert manager.open([1, 2, 3, 4, 5, 6, 7, 8]).page_ids == (0, 1)
    seq.append(1)
    seq.commit([9])
    assert manager.open([1, 2, 3, 4, 5, 6, 9, 9]).page_ids == (0, 2)


def test_truncate_to_nothing_leaves_the_cache():
    manager = make_manager()
    seq = opened(manager, [1] * 8)
    seq.truncate(0)
    assert (seq.page_ids, seq.token_ids, seq.num_cached_tokens) == ((), (), 0)
    assert manager.num_evictable_pages == 2
    seq.append(4)
    seq.commit([2] * 4)
    assert manager.stats().published == 3


@pytest.mark.parametrize("num_tokens, message", [(-1, "at least 0, got -1"), (7, r"at most 6 \(the sequence\), got 7")])
def test_truncate_out_of_range(num_tokens, message):
    seq = opened(make_manager(), [1] * 6)
    with pytest.raises(ValueError, match=f"num_tokens must be {message}"):
        seq.truncate(num_tokens)


def test_close_is_idempotent_and_everything_else_is_refused():
    manager = make_manager()
    seq = opened(manager, [1] * 6)
    seq.close()
    seq.close()
    assert seq.is_closed
    assert seq.page_ids == ()
    calls = {
        "append": lambda: seq.append(1),
        "try_append": lambda: seq.try_append(1),
        "can_append": lambda: seq.can_append(1),
        "commit": lambda: seq.commit([1]),
        "fork": seq.fork,
        "truncate": lambda: seq.truncate(0),
        "__enter__": seq.__enter__,
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"a sequence must be open for {name}, got a closed one"):
            call()
    assert manager.stats().cached == 1


def test_with_statement_closes_also_on_errors():
    manager = make_manager()
    seq = manager.open([])

    def fail_inside():
        with seq:
            seq.append(5)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert seq.is_closed
    assert manager.num_free_pages == 10


def test_without_prefix_cache_pages_are_free_after_close():
    manager = make_manager(prefix_cache=False)
    seq = opened(manager, [1] * 8)
    child = seq.fork()
    seq.close()
    assert manager.num_free_pages == 8
    child.truncate(3)
    child.close()
    assert manager.num_free_pages == 10
    assert manager.open([1] * 8).num_cached_tokens == 0


def make_pool(num_pages=6):
    spec = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.float32)
    return KVPool(spec, num_pages)


def test_pool_pages_are_copied_in_all_layers():
    pool = make_pool()
    manager = KVCacheManager(pool, debug=True)
    seq = manager.open([])
    slots = seq.append(6)
    stored = [torch.randn(2, 6, 2, 8) for _ in range(2)]
    for layer, (key, value) in enumerate(stored):
        pool.store(layer, key, value, slots)
    seq.commit([1, 2, 3, 4, 5, 6])
    child = seq.fork()
    new = child.append(1)
    for layer in range(2):
        pool.store(layer, *torch.randn(2, 1, 2, 8), new)
        for one in (seq, child):
            slots = manager.page_table([one]).slot_mapping(torch.tensor([0, one.num_tokens], dtype=torch.int32))
            key, value = pool.gather(layer, slots[:6])
            assert torch.equal(key, stored[layer][0])
            assert torch.equal(value, stored[layer][1])
    assert all(pages.numel() == 0 for pages in manager.take_copies())


def test_copy_that_fails_gives_its_page_back():
    class BrokenPool:
        num_pages, page_size, device = 4, 4, torch.device("cpu")

        def copy_pages(self, src, dst):
            raise RuntimeError("no device")

    manager = KVCacheManager(BrokenPool(), debug=True)
    seq = opened(manager, [1, 2])
    child = seq.fork()
    with pytest.raises(RuntimeError, match="no device"):
        child.append(5)
    assert child.page_ids == seq.page_ids == (0,)
    assert manager.num_free_pages == 3
    check_integrity(manager)


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_sequence_is_forked_not_copied(call):
    seq = opened(make_manager(), [1, 2, 3])
    with pytest.raises(TypeError, match=r"a sequence must .* Use fork\(\)"):
        call(seq)
    seq.close()


def test_copies_of_copies_are_taken_from_the_first_source():
    manager = make_manager()
    first = manager.open([])
    first.append(2)
    second = first.fork()
    second.append(1)
    third = second.fork()
    third.append(1)
    src, dst = manager.take_copies()
    assert (src.tolist(), dst.tolist()) == ([0, 0], [second.page_ids[0], third.page_ids[0]])


def test_append_after_fork_on_a_full_page_takes_a_new_page_each():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4])
    child = seq.fork()
    assert (child.append(1).tolist(), seq.append(1).tolist()) == ([4], [8])
    assert manager.stats().copied_pages == 0
    child.commit([5])
    seq.commit([6])
    assert (child.page_ids, seq.page_ids) == ((0, 1), (0, 2))


def test_abort_and_finish_in_one_step_free_once():
    manager = make_manager()
    seq = opened(manager, [1, 2, 3, 4, 5])
    other = seq.fork()
    for _ in range(2):
        seq.close()
        seq.close()
    assert manager.open([]).append(4).tolist() == [8, 9, 10, 11]
    assert other.page_ids == (0, 1)
    assert [seq.num_tokens, seq.num_committed, seq.token_ids] == [5, 5, ()]


def test_source_of_a_copy_is_not_given_away_before_it_is_taken():
    manager = make_manager(num_pages=3)
    seq = opened(manager, [1, 2])
    child = seq.fork()
    child.append(1)
    seq.close()
    assert manager.open([]).append(4).tolist() == [8, 9, 10, 11]
    with pytest.raises(OutOfPagesError, match="cannot allocate 1 page: 0 free, 0 evictable"):
        manager.open([]).append(1)
    assert [pages.tolist() for pages in manager.take_copies()] == [[0], [1]]
    assert manager.open([]).append(1).tolist() == [0]


def test_publishing_leaves_one_owner_to_pages_of_forks():
    manager = make_manager()
    seq = manager.open([])
    seq.append(8)
    forks = [seq.fork() for _ in range(3)]
    assert manager.ledger.allocator.num_owners(0) == 4
    forks[1].commit([1] * 8)
    assert manager.ledger.allocator.num_owners(0) == 1
    for one in (seq, *forks):
        one.close()
    assert manager.num_evictable_pages == 2


def test_open_of_a_long_prompt_takes_no_pages():
    manager = make_manager()
    with manager.open(range(1000)) as seq:
        assert (seq.num_tokens, seq.page_ids, repr(seq)) == (0, (), "Sequence(0 tokens, 0 committed, 0 pages)")
    assert repr(seq) == "Sequence(0 tokens, 0 committed, closed)"
