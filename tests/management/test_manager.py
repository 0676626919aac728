import random
import threading

import numpy as np
import pytest
import torch

from pagedkv import KVCacheManager, KVCacheSpec, KVPool, OutOfPagesError, PageTable, check_integrity


def make_manager(num_pages=10, page_size=4, **options):
    return KVCacheManager(num_pages, page_size=page_size, debug=True, **options)


def opened(manager, tokens, namespace=None):
    """A sequence with all of `tokens` committed."""
    seq = manager.open(tokens, namespace)
    if len(tokens) > seq.num_tokens:
        seq.append(len(tokens) - seq.num_tokens)
        seq.commit(tokens)
    return seq


def test_open_finds_the_longest_prefix_and_locks_it():
    manager = make_manager()
    opened(manager, range(10)).close()
    seq = manager.open([*range(6), 99, 99])
    assert (seq.num_cached_tokens, seq.num_tokens, seq.num_committed) == (4, 4, 4)
    assert seq.token_ids == (0, 1, 2, 3)
    assert manager.num_evictable_pages == 1
    assert manager.evict() == 1
    seq.close()
    assert manager.num_evictable_pages == 1


def test_open_may_find_everything():
    manager = make_manager()
    opened(manager, range(8)).close()
    assert manager.open(range(8)).num_cached_tokens == 8
    assert manager.open(range(7)).num_cached_tokens == 4


def test_namespaces_are_kept_apart_and_inherited():
    manager = make_manager()
    seq = opened(manager, range(4), namespace="a")
    child = seq.fork()
    assert child.namespace == "a"
    child.append(4)
    child.commit(range(8))
    assert [manager.open(range(8), name).num_cached_tokens for name in ("a", None, "")] == [8, 0, 0]


def test_append_evicts_what_was_used_longest_ago():
    manager = make_manager(num_pages=4)
    opened(manager, [1] * 8).close()
    opened(manager, [2] * 8).close()
    manager.open([1] * 8).close()
    seq = manager.open([])
    seq.append(6)
    assert manager.stats().evicted_pages == 2
    assert manager.open([1] * 8).num_cached_tokens == 8
    assert manager.open([2] * 8).num_cached_tokens == 0


def test_out_of_pages_names_the_numbers_and_can_be_retried():
    manager = make_manager(num_pages=4)
    opened(manager, [1] * 4).close()
    holder = opened(manager, [2] * 8)
    seq = manager.open([])
    with pytest.raises(OutOfPagesError, match="cannot allocate 3 pages: 1 free, 1 evictable, 2 pinned by 2 sequences"):
        seq.append(12)
    assert manager.open([1] * 4).num_cached_tokens == 4
    assert manager.can_append(4)
    assert not manager.can_append(13)
    for one in list(manager.ledger.live.values()):
        if one not in (holder, seq):
            one.close()
    holder.close()
    assert seq.append(12).shape == (12,)


def test_page_table_is_that_of_the_sequences():
    manager = make_manager()
    first, empty, second = opened(manager, range(8)), manager.open([]), manager.open([])
    second.append(5)
    table = manager.page_table([first, empty, second, first])
    expected = PageTable.from_rows([[0, 1], [], [2, 3], [0, 1]], seq_lens=[8, 0, 5, 8], page_size=4)
    for name in ("indptr", "indices", "last_page_len", "seq_lens"):
        assert torch.equal(getattr(table, name), getattr(expected, name)), name
    assert manager.page_table([]).num_seqs == 0
    # The table is a copy: what happens to the sequences later does not reach it.
    second.close()
    assert table.indices.tolist() == [0, 1, 2, 3, 0, 1]


def test_reorder_continues_the_chosen_beams():
    manager = make_manager()
    beams = [opened(manager, [beam] * 5) for beam in range(3)]
    continued = manager.reorder(beams, torch.tensor([2, 0, 2]))
    assert continued[0] is beams[2]
    assert continued[1] is beams[0]
    assert [beam.token_ids[0] for beam in continued] == [2, 0, 2]
    assert beams[1].is_closed
    assert continued[2].page_ids == beams[2].page_ids
    assert manager.stats().copied_pages == 0
    assert manager.reorder(continued, []) == []
    assert manager.stats().num_sequences == 0


@pytest.mark.parametrize(
    "parents, message",
    [
        ([0, 3], "parents must be in 0..1, got 3 at position 1"),
        ([-1], "parents must be 0 or more, got -1 at position 0"),
    ],
)
def test_reorder_refuses_wrong_parents_and_closes_nothing(parents, message):
    manager = make_manager()
    beams = [opened(manager, [beam]) for beam in range(2)]
    with pytest.raises(ValueError, match=message):
        manager.reorder(beams, parents)
    assert not any(beam.is_closed for beam in beams)
    assert manager.stats().num_sequences == 2


def test_sequences_of_others_are_refused():
    manager, other = make_manager(), make_manager()
    mine, closed = manager.open([]), manager.open([])
    closed.close()
    for call in (manager.page_table, lambda seqs: manager.reorder(seqs, [0])):
        with pytest.raises(ValueError, match="must be sequences of this manager, got another's at position 1"):
            call([mine, other.open([])])
        with pytest.raises(ValueError, match="must be open sequences for .*, got a closed one at position 0"):
            call([closed])
        with pytest.raises(TypeError, match="must be sequences, got int at position 0"):
            call([3])
    with pytest.raises(ValueError, match="beams must be different sequences, got one twice"):
        manager.reorder([mine, mine], [0])


def test_stats_count_every_page_once():
    manager = make_manager()
    opened(manager, [1] * 8).close()
    seq = opened(manager, [2] * 6)
    child = seq.fork()
    child.append(1)
    stats = manager.stats()
    assert (stats.num_pages, stats.free, stats.owned, stats.cached) == (10, 5, 3, 2)
    assert (stats.shared, stats.published, stats.evictable) == (1, 3, 2)
    assert (stats.num_sequences, stats.slots_reserved, stats.tokens) == (2, 16, 13)
    manager.open([1] * 8 + [3] * 2)
    stats = manager.stats()
    assert (stats.lookups, stats.asked_tokens, stats.hit_tokens) == (3, 8 + 6 + 10, 8)
    assert stats.hit_rate == 8 / 24
    assert (stats.copied_pages, stats.evicted_pages) == (1, 0)
    assert make_manager().stats().hit_rate == 0.0


def test_evict_frees_at_most_what_is_asked():
    manager = make_manager()
    opened(manager, [1] * 12).close()
    assert manager.evict(2) == 2
    assert manager.evict() == 1
    assert manager.evict(5) == 0
    with pytest.raises(ValueError, match="num_pages must be at least 0, got -1"):
        manager.evict(-1)


def test_a_pool_gives_page_size_and_device():
    spec = KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, dtype=torch.float32)
    pool = KVPool(spec, 5)
    manager = KVCacheManager(pool)
    assert (manager.num_pages, manager.page_size, manager.pool) == (5, 4, pool)
    assert KVCacheManager(pool, page_size=4).page_size == 4
    with pytest.raises(ValueError, match=r"page_size must be 4 \(the pool's\), got 8"):
        KVCacheManager(pool, page_size=8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((5,), ValueError, "page_size must be given with a number of pages, got None"),
        ((0, 4), ValueError, "num_pages must be at least 1, got 0"),
        ((5, 0), ValueError, "page_size must be at least 1, got 0"),
        ((5, 2.0), TypeError, "page_size must be an int, got float"),
        ((True, 4), TypeError, "num_pages must be an int, got bool"),
        (("pool",), TypeError, "pool_or_num_pages must be a pool or an int, got str"),
    ],
)
def test_sizes_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        KVCacheManager(*arguments)


def test_a_thousand_decoded_tokens_stay_one_node():
    manager = KVCacheManager(600, page_size=2)
    seq = opened(manager, [7, 7, 7])
    for token in range(1000):
        seq.append(1)
        seq.commit([token])
    nodes = [node for node in manager.ledger.cache.nodes() if node.parent is not None]
    assert [node.num_pages for node in nodes] == [501]
    check_integrity(manager)


def test_page_ids_beyond_32_bits_of_slots():
    """Slots are computed in 64 bits: page 2**20 of pages of 2**20 tokens."""
    manager = KVCacheManager(2**20, page_size=2**20)
    manager.ledger.allocator.allocate(2**20 - 1)
    assert manager.open([]).append(2).tolist() == [(2**20 - 1) * 2**20, (2**20 - 1) * 2**20 + 1]


def test_threads_share_a_manager():
    """Every thread checks at the end of its turn that nobody else was given its pages."""
    manager = KVCacheManager(48, page_size=2)
    owner = np.full(96, -1)
    problems = []

    def work(number):
        rng = random.Random(number)
        try:
            for turn in range(60):
                prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
                with manager.open(prompt) as seq:
                    start = seq.num_tokens
                    slots = seq.try_append(rng.randrange(1, 7) + len(prompt) - start)
                    if slots is None:
                        continue
                    mine = slots.numpy()
                    owner[mine] = number * 1000 + turn
                    seq.commit((prompt + [number] * seq.num_tokens)[start : seq.num_tokens])
                    child = seq.fork()
                    child.try_append(1)
                    manager.page_table([seq, child])
                    manager.stats()
                    child.close()
                    if not (owner[mine] == number * 1000 + turn).all():
                        problems.append(f"thread {number} lost a slot in turn {turn}")
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the test
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not problems
    check_integrity(manager)
    assert manager.stats().owned == 0


def test_threads_take_steps_swap_and_pin():
    """As above, with steps over several sequences, swaps, drops and pins among the calls."""

    class Tier:
        def save(self, pages):
            return pages

        def load(self, ticket, pages):
            pass

        def drop(self, ticket):
            pass

    manager = KVCacheManager(64, page_size=2, tier=Tier(), watermark=2)
    problems = []

    def work(number):
        rng = random.Random(number)
        try:
            for _ in range(60):
                seqs = [manager.open([rng.randrange(2)] * rng.randrange(5), window=rng.choice([None, 3])) for _ in "ab"]
                try:
                    step = manager.batch(seqs, rng.randrange(1, 4))
                    manager.commit(seqs, [number] * 2)
                    if len({*step.slot_mapping.tolist()}) != step.num_tokens:
                        problems.append("a slot was given twice")
                    with manager.pin([rng.randrange(2)] * 4):
                        manager.swap_out(seqs[0])
                        manager.drop(seqs[1])
                        for seq in seqs:
                            manager.swap_in(seq)
                except OutOfPagesError:
                    pass
                for seq in seqs:
                    seq.close()
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the test
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not problems
    check_integrity(manager)
    assert (manager.stats().owned, manager.stats().num_sequences) == (0, 0)
