"""A hybrid manager followed page by page, and what it refuses."""

import numpy as np
import pytest
import torch

from pagedkv import (
    HostPageStore,
    HybridKVCacheManager,
    HybridKVPool,
    HybridSequence,
    KVCacheManager,
    KVCacheSpec,
    LayerGroup,
    OutOfPagesError,
    TierError,
    check_integrity,
)

FULL, SLIDING = LayerGroup((0,), None, 8), LayerGroup((1, 2), 4, 4)


def make_manager(num_pages=20, **options):
    return HybridKVCacheManager(num_pages, [FULL, SLIDING], debug=True, **options)


def grow(manager, ids, namespace=None):
    seq = manager.open(ids, namespace)
    if len(ids) > seq.num_tokens:
        seq.append(len(ids) - seq.num_tokens)
        seq.commit(ids[seq.num_committed :])
    return seq


def test_window_gives_pages_back_to_all_groups():
    manager = make_manager(num_pages=6, prefix_cache=False)
    seq = manager.open([])
    for start in range(0, 32, 4):
        full, sliding = seq.append(4)
        assert full.shape == sliding.shape == (4,)
        seq.commit(list(range(start, start + 4)))
    # 32 tokens are four pages of the full group; of the sliding one the last three tokens are seen.
    assert [len(pages) for pages in seq.page_ids] == [4, 8]
    assert [page >= 0 for page in seq.page_ids[1]] == [False] * 7 + [True]
    assert manager.num_free_pages == 1


def test_hit_ends_where_all_groups_have_what_their_windows_see():
    manager = make_manager()
    ids = list(range(40))
    grow(manager, ids).close()
    seq = manager.open([*ids[:24], 99])
    assert seq.num_cached_tokens == 24
    full, sliding = seq.page_ids
    assert len(full) == 3
    assert -1 not in full
    # Three tokens before token 24 are seen.
    assert [page >= 0 for page in sliding] == [False] * 5 + [True]
    assert seq.num_tokens == 24
    assert manager.stats().hit_tokens == 24


def test_hit_gets_shorter_where_a_window_has_lost_its_pages():
    manager = make_manager(num_pages=40)
    ids = list(range(40))
    grow(manager, ids).close()
    sliding = manager.managers[1].ledger.cache
    pages = sliding.match(np.array(ids[:32])).pages
    assert pages.tolist().count(-1) == 7
    locked = sliding.match(np.array(ids[:16])).handle
    sliding.lock(locked)
    manager.budget.allocator.release(sliding.evict(100))
    sliding.unlock(locked)
    assert manager.open([*ids, 7]).num_cached_tokens == 16
    check_integrity(manager)


def test_a_prompt_that_one_group_lacks_is_computed_again_for_all_and_kept_once():
    manager = make_manager(num_pages=40)
    ids = list(range(24))
    grow(manager, ids).close()
    num_full = manager.managers[0].ledger.cache.num_cached_pages
    manager.budget.allocator.release(manager.managers[1].ledger.cache.evict(100))
    seq = grow(manager, ids)
    assert seq.num_cached_tokens == 0
    seq.close()
    assert manager.managers[0].ledger.cache.num_cached_pages == num_full == 3
    assert manager.open(ids).num_cached_tokens == 24


def test_append_is_for_all_groups_or_for_none():
    manager = make_manager(num_pages=4)
    seq = manager.open([])
    seq.append(8)
    assert not seq.can_append(1)
    assert seq.try_append(1) is None
    before = manager.stats(), seq.page_ids
    with pytest.raises(OutOfPagesError, match="cannot allocate 2 pages: 1 free, 0 evictable, 3 pinned by 2 sequences"):
        seq.append(1)
    assert (manager.stats(), seq.page_ids) == before


def test_a_copy_that_fails_leaves_every_group_as_it_was():
    class Stubborn:
        num_pages, device, groups = 20, torch.device("cpu"), (FULL, SLIDING)
        num_calls = 0

        def copy_pages(self, src, dst):
            self.num_calls += 1
            if self.num_calls == 2:
                raise RuntimeError("no copies")

    for call in ("append", "batch"):
        pool = Stubborn()
        manager = HybridKVCacheManager(pool, debug=True)
        seq = grow(manager, [1, 2, 3])
        fork = seq.fork()
        before = manager.num_free_pages
        with pytest.raises(RuntimeError, match="no copies"):
            seq.append(1) if call == "append" else manager.batch([seq])
        assert seq.num_tokens == fork.num_tokens == 3
        # The copy that was made stays in the place of the shared page.
        assert before - manager.num_free_pages == 1
        seq.append(1)
        check_integrity(manager)


def test_a_step_has_a_table_for_each_group():
    manager = make_manager()
    seqs = [grow(manager, list(range(length))) for length in (9, 3, 17)]
    step = manager.batch(seqs, [1, 2, 1])
    assert step.query_indptr.tolist() == [0, 1, 3, 4]
    assert step.seq_lens.tolist() == [10, 5, 18]
    assert step.num_tokens == 4
    tables = manager.page_tables(seqs)
    for own, group, table in zip(step.groups, (FULL, SLIDING), tables, strict=True):
        assert own.page_table.page_size == group.page_size
        assert own.page_table.indptr.tolist() == table.indptr.tolist()
        assert own.page_table.indices.tolist() == table.indices.tolist()
    first = tables[1].indptr[2]
    assert seqs[2].page_ids[1][:2] == (-1, -1)
    assert step.groups[1].page_table.indices[first : first + 2].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"must have a reserved token without an id each"):
        manager.commit([*seqs, grow(manager, [1])], [1, 1, 1, 1])
    manager.commit(seqs, [5, 6, 7])
    assert [seq.num_committed for seq in seqs] == [10, 4, 18]


def test_pages_come_back_from_a_tier_or_are_computed_again():
    spec = KVCacheSpec(num_layers=3, num_kv_heads=1, head_dim=8, dtype=torch.float32, order="page_first", page_size=4)
    pool = HybridKVPool(spec, (LayerGroup((0,), None, 8), LayerGroup((1, 2), 4, 4)), num_pages=12)
    manager = HybridKVCacheManager(pool, tier=HostPageStore(pool, 6), debug=True)
    ids = list(range(17))
    seq = manager.open([])
    for start in range(0, 17, 4):
        new = ids[start : start + 4]
        slots = seq.append(len(new))
        for layer in range(3):
            states = torch.tensor(new, dtype=torch.float32)[:, None, None].expand(-1, 1, 8) + 100 * layer
            pool.store(layer, states.contiguous(), states.contiguous(), slots[0 if layer == 0 else 1])
        seq.commit(new)

    def check():
        for layer in range(3):
            number, first = (0, 0) if layer == 0 else (1, 14)
            group = pool.groups[number]
            pages = seq.page_ids[number]
            slots = [
                pages[position // group.page_size] * group.page_size + position % group.page_size
                for position in range(first, 17)
            ]
            key, value = pool.gather(layer, torch.tensor(slots))
            assert key[:, 0, 0].tolist() == value[:, 0, 3].tolist() == [float(i + 100 * layer) for i in ids[first:]]

    check()
    manager.swap_out(seq)
    assert seq.state == "swapped out"
    manager.evict()
    other = grow(manager, [77] * 20)
    assert manager.swap_in(seq).tolist() == []
    check()
    other.close()
    manager.drop(seq)
    again = manager.swap_in(seq)
    # Published again when they came back: whole pages of both groups.
    assert again.tolist() == ids[16:]
    assert seq.num_tokens == 16


def test_a_tier_without_room_for_all_groups_keeps_nothing():
    spec = KVCacheSpec(num_layers=3, num_kv_heads=1, head_dim=8, dtype=torch.float32, order="page_first")
    pool = HybridKVPool(spec, (FULL, SLIDING), num_pages=12)
    store = HostPageStore(pool, 2)
    manager = HybridKVCacheManager(pool, tier=store, debug=True)
    seq = grow(manager, list(range(9)))
    pages = seq.page_ids
    with pytest.raises(TierError, match="must have room for"):
        manager.swap_out(seq)
    assert (seq.state, seq.page_ids, store.num_free_pages) == ("on pages", pages, 2)


def test_swapped_in_all_or_none():
    class Tier:
        saved, fails = {}, False

        def save(self, pages):
            self.saved[len(self.saved)] = pages
            return len(self.saved) - 1

        def load(self, ticket, pages):
            if self.fails and ticket == 1:
                raise OSError("disk")

        def drop(self, ticket):
            self.saved.pop(ticket)

    tier = Tier()
    manager = make_manager(tier=tier, prefix_cache=False)
    seq = grow(manager, list(range(9)))
    manager.swap_out(seq)
    tier.fails = True
    with pytest.raises(OSError, match="disk"):
        manager.swap_in(seq)
    assert seq.state == "swapped out"
    assert manager.num_free_pages == 20
    assert len(tier.saved) == 2
    tier.fails = False
    assert manager.swap_in(seq).tolist() == []
    assert not tier.saved


def test_pins_hold_what_all_groups_need():
    manager = make_manager()
    ids = list(range(24))
    grow(manager, ids).close()
    pins = manager.pin(ids)
    manager.evict()
    assert manager.open(ids).num_cached_tokens == 24
    for pin in pins:
        pin.unpin()


def test_parts_that_an_interrupt_parted_are_equal_again():
    manager = make_manager()
    seq = grow(manager, list(range(9)))
    seq.parts[0].append(3)
    assert seq.num_tokens == 9
    seq.append(1)
    assert [part.num_tokens for part in seq.parts] == [10, 10]
    manager.managers[0].drop(seq.parts[0])
    assert manager.can_append(1)
    with pytest.raises(ValueError, match="must be on pages for append, got one that is dropped"):
        seq.append(1)
    manager.swap_in(seq)
    assert seq.state == "on pages"
    seq.parts[1].close()
    with pytest.raises(ValueError, match="must be open for append"):
        seq.append(1)
    assert seq.is_closed


def test_reorder_keeps_parts_together():
    manager = make_manager()
    first, second = grow(manager, [1, 2, 3]), grow(manager, [4, 5])
    beams = manager.reorder([first, second], [1, 0, 1])
    assert beams[:2] == [second, first]
    assert isinstance(beams[2], HybridSequence)
    assert beams[2].token_ids == (4, 5)
    assert manager.reorder(beams, [2])[0] is beams[2]
    assert first.is_closed


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: HybridKVCacheManager(4), ValueError, "groups must be given with a number of pages"),
        (lambda: HybridKVCacheManager(4, []), ValueError, "groups must be at least one"),
        (lambda: HybridKVCacheManager(object()), TypeError, "pool_or_num_pages must be a hybrid pool"),
        (lambda: make_manager(prefix_cache="radix"), TypeError, "prefix_cache must be a bool, got str"),
        (lambda: make_manager().batch([1]), TypeError, "seqs must be hybrid sequences, got int at position 0"),
        (lambda: make_manager().batch([make_manager().open([])]), ValueError, "seqs must be sequences of this manager"),
        (lambda: make_manager().commit([], [1]), ValueError, r"token_ids must have shape \[S\] with S = 0"),
        (lambda: make_manager().open([]).truncate(1), ValueError, "num_tokens must be at most 0"),
        (lambda: make_manager().open([-1]), ValueError, "token_ids must be 0 or more"),
        (lambda: make_manager().swap_out(make_manager().open([])), ValueError, "sequences of this manager"),
        (lambda: (one := make_manager()).swap_out(one.open([])), ValueError, "tier must be given"),
        (lambda: (one := make_manager()).swap_in(one.open([])), ValueError, "must be swapped out or dropped"),
        (
            lambda: (one := make_manager()).batch([one.open([])] * 2, [1, 0]),
            ValueError,
            "num_tokens must be at least 1",
        ),
        (lambda: KVCacheManager(4, 2, window=3).open([], window=4), ValueError, r"window must be 3 \(the manager's\)"),
    ],
)
def test_misuse_is_refused_with_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
