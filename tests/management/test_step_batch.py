import numpy as np
import pytest
import torch

from pagedkv import (
    KVCacheManager,
    KVCacheSpec,
    KVPool,
    OutOfPagesError,
    PageTable,
    check_integrity,
    paged_attention,
    plan_attention,
)


def make_manager(num_pages=16, page_size=4, **options):
    return KVCacheManager(num_pages, page_size=page_size, debug=True, **options)


def raising(error):
    def call(*_, **__):
        raise error

    return call


def opened(manager, num_tokens, first_id=0):
    seq = manager.open([])
    if num_tokens:
        seq.append(num_tokens)
        seq.commit(np.arange(first_id, first_id + num_tokens, dtype=np.int32))
    return seq


def same_table(table, seqs):
    expected = PageTable.from_rows(
        [seq.page_ids for seq in seqs], [seq.num_tokens for seq in seqs], seqs[0]._ledger.page_size
    )
    for name in ("indptr", "last_page_len", "seq_lens"):
        assert torch.equal(getattr(table, name), getattr(expected, name)), name
    assert table.indices[: table.indptr[-1]].tolist() == expected.indices.tolist()
    assert torch.equal(table.to_dense(), expected.to_dense())


def test_one_token_each_gives_what_the_step_needs():
    manager = make_manager()
    seqs = [opened(manager, 4), opened(manager, 0), opened(manager, 6, 50)]
    step = manager.batch(seqs)
    # Pages 0, 1 and 2 are taken, the new ones are 3 and 4; the third sequence writes on in page 2.
    assert step.slot_mapping.tolist() == [12, 16, 10]
    assert step.slot_mapping.dtype == torch.int64
    assert (step.query_indptr.tolist(), step.seq_lens.tolist(), step.num_tokens) == ([0, 1, 2, 3], [5, 1, 7], 3)
    same_table(step.page_table, seqs)
    assert torch.equal(step.page_table.slot_mapping(step.query_indptr), step.slot_mapping)


@pytest.mark.parametrize("as_what", [list, np.array, torch.tensor])
def test_several_tokens_each(as_what):
    manager = make_manager()
    seqs = [opened(manager, 3), opened(manager, 0), opened(manager, 6, 50)]
    step = manager.batch(seqs, as_what([6, 1, 2]))
    assert step.query_indptr.tolist() == [0, 6, 7, 9]
    assert step.seq_lens.tolist() == [9, 1, 8]
    assert torch.equal(step.page_table.slot_mapping(step.query_indptr), step.slot_mapping)
    same_table(step.page_table, seqs)
    again = manager.batch(seqs, 5)
    assert torch.equal(again.page_table.slot_mapping(again.query_indptr), again.slot_mapping)
    same_table(again.page_table, seqs)


@pytest.mark.parametrize("num_between", [1, 2, 5, 100])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_steps_follow_one_another_and_leave_earlier_tables_alone(page_size, num_between):
    """Whether the table is asked for in each step, in some or at the end, it is what it was in its step."""
    manager = KVCacheManager(200, page_size)
    seqs = [opened(manager, number, 100 * number) for number in range(5)]
    kept, steps = [], []
    for number in range(20):
        step = manager.batch(seqs)
        expected = PageTable.from_rows([seq.page_ids for seq in seqs], [seq.num_tokens for seq in seqs], page_size)
        steps.append((step, expected))
        manager.commit(seqs, np.full(5, number, np.int32))
        assert step.seq_lens.tolist() == [seq.num_tokens for seq in seqs]
        dense = step.dense_table()
        assert [[page for page in row if page >= 0] for row in dense.tolist()] == [[*seq.page_ids] for seq in seqs]
        if number % num_between == num_between - 1:
            same_table(step.page_table, seqs)
            kept.append((step.page_table, step.page_table.indices.clone(), step.page_table.indptr.clone()))
        if number == 7:
            seqs[2].truncate(1)
        if number == 9:
            seqs[0].append(page_size)
            seqs[0].commit([1] * page_size)
        if number == 12:
            seqs = [seqs[4], *seqs[:3], opened(manager, 2, 900)]
    for table, indices, indptr in kept:
        assert torch.equal(table.indices, indices)
        assert torch.equal(table.indptr, indptr)
    for step, expected in steps:
        for name in ("indptr", "indices", "last_page_len", "seq_lens"):
            assert torch.equal(getattr(step.page_table, name), getattr(expected, name)), name


AFTER_A_STEP = {
    "truncate": lambda manager, seqs: (seqs[0].truncate(1), seqs[0].append(9)),
    "close": lambda manager, seqs: (seqs[1].close(), opened(manager, 30, 500)),
    "close all": lambda manager, seqs: ([seq.close() for seq in seqs], manager.evict(), opened(manager, 60, 500)),
    "swap out": lambda manager, seqs: (manager.drop(seqs[2]), opened(manager, 30, 500)),
    "fork and copy": lambda manager, seqs: (manager.batch([seqs[1], seqs[1].fork()]), manager.take_copies()),
    "other sequences": lambda manager, seqs: manager.batch([opened(manager, 3, 800), *seqs[::-1]]),
    "window": lambda manager, seqs: (
        manager.commit(seqs, [1, 2, 3]),
        manager.batch(seqs),
        manager.commit(seqs, [1, 2, 3]),
    ),
}


@pytest.mark.parametrize("change", AFTER_A_STEP)
def test_a_table_that_is_asked_for_late_is_what_it_was(change):
    tables = []
    for is_asked_at_once in (True, False):
        manager = KVCacheManager(60, page_size=2)
        seqs = [opened(manager, 7), opened(manager, 4, 50), manager.open([], window=2)]
        seqs[2].append(5)
        seqs[2].commit([9, 9, 9, 9, 9])
        step = manager.batch(seqs)
        if is_asked_at_once:
            tables.append(step.page_table)
        AFTER_A_STEP[change](manager, seqs)
        check_integrity(manager)
        tables.append(step.page_table)
    at_once, again, late = tables
    assert again is at_once
    for name in ("indptr", "indices", "last_page_len", "seq_lens"):
        assert torch.equal(getattr(at_once, name), getattr(late, name)), name


@pytest.mark.parametrize("page_size", [1, 4])
def test_no_csr_is_made_for_who_reads_the_dense_table_alone(page_size, monkeypatch):
    manager = KVCacheManager(400, page_size)
    seqs = [opened(manager, 3 + number, 100 * number) for number in range(5)]
    monkeypatch.setattr("pagedkv.management.row_heap.RowSnapshot.read", raising(AssertionError))
    for number in range(12):
        step = manager.batch(seqs)
        dense, lengths = step.dense_table(), step.seq_lens
        assert [
            row[:count] for row, count in zip(dense.tolist(), (-(-lengths // page_size)).tolist(), strict=True)
        ] == [[*seq.page_ids] for seq in seqs]
        slots = [seq.page_ids[-1] * page_size + (seq.num_tokens - 1) % page_size for seq in seqs]
        assert step.slot_mapping.tolist() == slots
        manager.commit(seqs, np.arange(5) + 10 * number)


def test_seq_lens_and_slots_are_the_callers():
    manager = make_manager()
    seqs = [opened(manager, 3), opened(manager, 1)]
    step = manager.batch(seqs)
    step.seq_lens.zero_()
    step.slot_mapping.zero_()
    assert step.seq_lens.tolist() == [4, 2]
    assert manager.batch(seqs).slot_mapping.tolist() == [8, 6]


def test_dense_table_is_one_buffer_that_is_written_where_it_changed():
    manager = make_manager(40, 2)
    seqs = [opened(manager, 2), opened(manager, 3, 50)]
    first = manager.batch(seqs).dense_table()
    before = first.clone()
    step = manager.batch(seqs)
    second = step.dense_table()
    assert first.data_ptr() == second.data_ptr()
    assert (before[0].tolist(), second[0, :2].tolist()) == ([0, 3], [0, 3])
    manager.batch(seqs, 2)
    with pytest.raises(ValueError, match="must be asked for before the next step, got a step that is over"):
        step.dense_table()


def test_a_dense_table_whose_making_was_interrupted_is_made_again(monkeypatch):
    manager = KVCacheManager(20, page_size=2)
    seqs = [opened(manager, 4), opened(manager, 2, 50)]
    step = manager.batch(seqs)
    with monkeypatch.context() as patch:
        patch.setattr("pagedkv.management.step_table.StepTable._put_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step.dense_table()
    assert step.dense_table().tolist() == [[0, 1, 3], [2, 4, -1]]


def test_all_or_nothing():
    manager = make_manager(4, 4)
    seqs = [opened(manager, 4), opened(manager, 4, 50), opened(manager, 3, 70)]
    assert not manager.can_batch(seqs)
    before = [seq.page_ids for seq in seqs], manager.stats()
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 1 free"):
        manager.batch(seqs)
    assert before == ([seq.page_ids for seq in seqs], manager.stats())
    assert manager.can_batch(seqs[1:])
    assert manager.batch(seqs[1:]).slot_mapping.tolist() == [12, 11]


def test_a_step_copies_shared_last_pages_in_one_call():
    spec = KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, dtype=torch.float32)
    pool = KVPool(spec, 8)
    pool.buffer.zero_()
    calls = []
    copy_pages = pool.copy_pages
    pool.copy_pages = lambda src, dst: (calls.append((src.tolist(), dst.tolist())), copy_pages(src, dst))
    manager = KVCacheManager(pool, debug=True)
    first = opened(manager, 6)
    pool.key_pages(1)[1] = 5.0
    seqs = [first, first.fork(), first.fork()]
    step = manager.batch(seqs)
    assert calls == [([1, 1], [2, 3])]
    # The last one that names the page writes in place.
    assert [seq.page_ids for seq in seqs] == [(0, 2), (0, 3), (0, 1)]
    assert step.slot_mapping.tolist() == [10, 14, 6]
    assert (pool.key_pages(1)[1:4] == 5.0).all()
    same_table(step.page_table, seqs)


def test_a_copy_that_fails_leaves_the_step_undone():
    class BrokenPool:
        num_pages, page_size, device = 6, 4, torch.device("cpu")

        def copy_pages(self, src, dst):
            raise RuntimeError("no device")

    manager = KVCacheManager(BrokenPool(), debug=True)
    first = opened(manager, 2)
    seqs = [first, first.fork(), opened(manager, 4, 50)]
    with pytest.raises(RuntimeError, match="no device"):
        manager.batch(seqs)
    assert [seq.num_tokens for seq in seqs] == [2, 2, 4]
    assert manager.num_free_pages == 4


def test_a_published_page_that_was_cut_is_copied():
    manager = make_manager()
    seq = opened(manager, 8)
    seq.truncate(6)
    step = manager.batch([seq])
    assert [pages.tolist() for pages in manager.take_copies()] == [[1], [2]]
    assert step.slot_mapping.tolist() == [10]
    assert manager.open(range(8)).page_ids == (0, 1)


def test_commit_names_one_token_each_and_publishes_full_pages():
    manager = make_manager()
    seqs = [opened(manager, 3), opened(manager, 5, 50)]
    manager.batch(seqs)
    manager.commit(seqs, torch.tensor([3, 99]))
    assert [seq.token_ids for seq in seqs] == [(0, 1, 2, 3), (50, 51, 52, 53, 54, 99)]
    assert manager.open([0, 1, 2, 3]).num_cached_tokens == 4
    with pytest.raises(ValueError, match="must have a reserved token without an id each, got none at position 0"):
        manager.commit(seqs, [7, 7])
    with pytest.raises(ValueError, match=r"token_ids must have shape \[S\] with S = 2 \(set by seqs\), got \[1\]"):
        manager.commit(seqs, [7])


@pytest.mark.parametrize(
    "num_tokens, error, message",
    [
        (0, ValueError, "num_tokens must be at least 1, got 0"),
        ([1, 0], ValueError, "num_tokens must be at least 1, got 0 at position 1"),
        ([1], ValueError, r"num_tokens must be an int or have shape \[2\], got \[1\]"),
        (True, TypeError, "num_tokens must be an int, got bool"),
        ([1.0, 2.0], TypeError, "num_tokens must be ints, got float"),
    ],
)
def test_number_of_tokens_is_checked(num_tokens, error, message):
    manager = make_manager()
    seqs = [opened(manager, 1), opened(manager, 1)]
    with pytest.raises(error, match=message):
        manager.batch(seqs, num_tokens)


def test_sequences_are_checked_in_every_step():
    manager, other = make_manager(), make_manager()
    seqs = [opened(manager, 1), opened(manager, 1)]
    manager.batch(seqs)
    with pytest.raises(ValueError, match="seqs must be different sequences, got one twice"):
        manager.batch([seqs[0], seqs[0]])
    with pytest.raises(ValueError, match="must be sequences of this manager, got another's at position 1"):
        manager.batch([seqs[0], opened(other, 1)])
    manager.batch(seqs)
    seqs[1].close()
    # Its row belongs to somebody else now.
    opened(manager, 1)
    with pytest.raises(ValueError, match="must be open sequences for a step, got a closed one"):
        manager.batch(seqs)
    manager.drop(seqs[0])
    with pytest.raises(ValueError, match="must be on pages for a step, got one that is dropped at position 0"):
        manager.batch(seqs[:1])


def test_a_step_of_nobody_is_empty():
    step = make_manager().batch([])
    assert (step.num_tokens, step.query_indptr.tolist(), step.page_table.num_seqs) == (0, [0], 0)
    assert step.dense_table().shape == (0, 0)


def test_a_sequence_that_joins_and_one_that_leaves():
    manager = make_manager()
    seqs = [opened(manager, 5), opened(manager, 5, 50), opened(manager, 5, 70)]
    manager.batch(seqs)
    seqs[1].close()
    del seqs[1]
    seqs.append(opened(manager, 3, 90))
    same_table(manager.batch(seqs).page_table, seqs)


def test_attention_over_the_table_of_a_step():
    """The table is as good as one that was checked entry by entry."""
    spec = KVCacheSpec(num_layers=1, num_kv_heads=2, head_dim=16, page_size=4, dtype=torch.float32)
    pool = KVPool(spec, 12)
    manager = KVCacheManager(pool)
    seqs = [opened(manager, 5), opened(manager, 9, 50)]
    pool.store(0, *torch.randn(2, 14, 2, 16), manager.page_table(seqs).slot_mapping(torch.tensor([0, 5, 14]).int()))
    for num_tokens in (1, [2, 3]):
        step = manager.batch(seqs, num_tokens)
        pool.store(0, *torch.randn(2, step.num_tokens, 2, 16), step.slot_mapping)
        checked = PageTable.from_rows([seq.page_ids for seq in seqs], step.seq_lens.tolist(), page_size=4)
        query = torch.randn(step.num_tokens, 4, 16)
        outputs = []
        for table in (step.page_table, checked):
            plan = plan_attention(step.query_indptr, table, num_q_heads=4, num_kv_heads=2, head_dim=16)
            outputs.append(paged_attention(query, pool.key_pages(0), pool.value_pages(0), plan))
        assert torch.equal(*outputs)


def test_commit_of_some_sequences_leaves_the_table_of_the_step():
    manager = make_manager()
    seqs = [opened(manager, 3), opened(manager, 5, 50)]
    step = manager.batch(seqs)
    manager.commit(seqs[1:], [9])
    assert (seqs[0].num_committed, seqs[1].num_committed) == (3, 6)
    assert step.dense_table().shape == (2, 2)
    with pytest.raises(ValueError, match="seqs must be different sequences, got one twice"):
        manager.commit([seqs[0], seqs[0]], [1, 2])


def test_an_interrupted_step_is_not_built_upon(monkeypatch):
    manager = KVCacheManager(16, page_size=4)
    seqs = [opened(manager, 4), opened(manager, 6, 50)]
    manager.batch(seqs)
    manager.commit(seqs, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr("pagedkv.management.step_planner.StepBatch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            manager.batch(seqs)
    for seq in seqs:
        seq.truncate(seq.num_committed)
    step = manager.batch(seqs)
    same_table(step.page_table, seqs)
    assert [seq.num_tokens for seq in seqs] == [6, 8]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_planner_that_forgets_reads_everything_again():
    manager = KVCacheManager(16, page_size=4)
    seqs = [opened(manager, 4), opened(manager, 6, 50)]
    step = manager.batch(seqs)
    # As after an interrupt: books that no version tells of.
    rows = manager.ledger.rows
    rows.num_tokens[seqs[0]._row] = 4
    rows.pages.truncate(seqs[0]._row, 1)
    manager._planner.forget()
    with pytest.raises(ValueError, match="got a step that is over"):
        step.dense_table()
    assert list(manager.step_rows()) == []
    with pytest.raises(ValueError, match="a reserved token without an id each, got none at position 0"):
        manager.commit(seqs, [1, 1])
    again = manager.batch(seqs)
    assert again.seq_lens.tolist() == [5, 8]
    same_table(again.page_table, seqs)


def test_what_a_cache_refuses_is_not_committed(monkeypatch):
    manager = make_manager(page_size=4)
    seqs = [opened(manager, 3), opened(manager, 5, 50), opened(manager, 3, 70), opened(manager, 7, 90)]
    manager.batch(seqs)
    cache, calls = type(manager.ledger.cache), []
    insert = cache.insert

    def refuse_the_second(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("no more")
        return insert(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "insert", refuse_the_second)
        with pytest.raises(ValueError, match="no more"):
            manager.commit(seqs, [1, 2, 3, 4])
    assert [seq.num_committed for seq in seqs] == [4, 5, 3, 7]
    check_integrity(manager)
    manager.commit(seqs[1:], [2, 3, 4])
    assert [seq.token_ids[-1] for seq in seqs] == [1, 2, 3, 4]
    assert manager.open([70, 71, 72, 3]).num_cached_tokens == 4


@pytest.mark.parametrize("num_before", [0, 1])
def test_forks_that_disagree_are_refused_before_anything_is_committed(num_before):
    manager = KVCacheManager(20, page_size=2)
    seq = manager.open([])
    other = manager.open([9])
    other.append(1)
    seq.append(2)
    if num_before:
        seq.commit([1])
    else:
        seq.commit([1, 2])
        seq.append(2)
        seq.commit([3])
    fork = seq.fork()
    counts = [one.num_committed for one in (other, seq, fork)]
    with pytest.raises(
        ValueError, match="must be equal for forks that share a page, got 5 at position 1 and 6 at position 2"
    ):
        manager.commit([other, seq, fork], [9, 5, 6])
    assert [one.num_committed for one in (other, seq, fork)] == counts
    check_integrity(manager)
    manager.commit([other, seq, fork], [9, 5, 5])
    assert seq.token_ids == fork.token_ids
    check_integrity(manager)


@pytest.mark.parametrize("order", [1, -1])
def test_a_fork_that_is_behind_must_name_what_the_one_that_fills_the_page_has_named(order):
    manager = make_manager(page_size=3)
    ahead = opened(manager, 1)
    ahead.append(6)
    behind = ahead.fork()
    ahead.commit([7])
    words = "must be those that a fork committed for the same pages, got 9 instead of 7 at position 1"
    with pytest.raises(ValueError, match=words):
        manager.commit([ahead, behind][::order], [5, 9][::order])
    assert (ahead.num_committed, behind.num_committed) == (2, 1)
    manager.commit([ahead, behind][::order], [5, 7][::order])
    assert (ahead.num_locked_tokens, behind.num_locked_tokens, behind.token_ids) == (3, 3, (0, 7))
    check_integrity(manager)


@pytest.mark.parametrize("counts", [[2**63 - 1, 1], [2**62, 2**62], 2**31 - 1, 2**40, 13])
def test_counts_beyond_all_slots_are_out_of_pages_and_change_nothing(counts):
    manager = make_manager(num_pages=6, page_size=2)
    seqs = [manager.open([]), manager.open([])]
    assert not manager.can_batch(seqs, counts)
    with pytest.raises(OutOfPagesError):
        manager.batch(seqs, counts)
    assert manager.num_free_pages == 6
    assert manager.batch(seqs, [5, 6]).seq_lens.tolist() == [5, 6]


def test_a_sequence_that_cannot_be_made_leaves_no_lock(monkeypatch):
    manager = make_manager(page_size=4)
    with manager.open([1, 2, 3, 4]) as seq:
        seq.append(4)
        seq.commit([1, 2, 3, 4])
    for options, words in (
        ({"window": 2**63}, "window must be below"),
        ({"priority": 2**63}, "priority must be below"),
    ):
        with pytest.raises(ValueError, match=words):
            manager.open([1, 2, 3, 4], **options)
    with monkeypatch.context() as patched:
        patched.setattr(type(manager.ledger.rows), "add", raising(MemoryError))
        with pytest.raises(MemoryError):
            manager.open([1, 2, 3, 4])
    assert manager.num_evictable_pages == 1
    check_integrity(manager)


def test_a_step_that_was_interrupted_is_not_built_upon(monkeypatch):
    manager = make_manager()
    seqs = [manager.open([]) for _ in range(3)]
    manager.batch(seqs[:2])
    with monkeypatch.context() as patched:
        patched.setattr(type(manager._planner._table), "replace", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            manager.batch(seqs)
    manager.commit(seqs[:2], [7, 8])
    check_integrity(manager)
    assert manager.batch(seqs).seq_lens.tolist() == [2, 2, 1]


def test_commit_of_a_step_is_that_of_each_sequence():
    """Pages are published and given back behind windows at the same tokens."""
    managers = [make_manager(80, 2), make_manager(80, 2)]
    worlds = [[manager.open([], window=window) for window in (None, 1, 2, 3, 5, 8)] for manager in managers]
    for number in range(15):
        for manager, seqs in zip(managers, worlds, strict=True):
            manager.batch(seqs)
        managers[0].commit(worlds[0], np.arange(6) + 10 * number)
        for place, seq in enumerate(worlds[1]):
            seq.commit([10 * number + place])
        states = [[(seq.num_committed, seq.num_pages_given_back, seq.page_ids) for seq in seqs] for seqs in worlds]
        assert states[0] == states[1]
        assert managers[0].ledger.cache.num_cached_pages == managers[1].ledger.cache.num_cached_pages
    assert [given_back for _, given_back, _ in states[0]] == [0, 7, 7, 6, 5, 4]
