import pytest

from pagedkv import HashedPageCache, KVCacheManager


def make_manager(num_pages=6, page_size=2, **options):
    return KVCacheManager(num_pages, page_size=page_size, debug=True, **options)


def grow(seq, tokens):
    slots = seq.append(len(tokens))
    seq.commit(tokens)
    return slots.tolist()


def test_pages_behind_the_window_are_given_back_and_later_slots_stay():
    manager = make_manager()
    seq = manager.open([], window=3)
    grow(seq, [1, 2, 3, 4, 5])
    # The next token is at 5 and sees from position 3 on: page 1 is still needed.
    assert seq.page_ids == (-1, 1, 2)
    assert grow(seq, [6]) == [5]
    assert seq.page_ids == (-1, -1, 2)
    assert manager.num_free_pages == 5
    stats = manager.stats()
    assert (stats.slots_reserved, stats.tokens, stats.slots_unused) == (2, 2, 0)


def test_a_window_runs_for_ever_in_few_pages():
    # Three are in use at a time; the first two are published, and locked until the window has left both.
    manager = make_manager(num_pages=4)
    seq = manager.open([], window=4)
    for token in range(100):
        grow(seq, [token])
    assert seq.num_tokens == 100
    assert manager.stats().owned <= 3
    assert seq.page_ids.count(-1) >= 47


@pytest.mark.parametrize("window, gone", [(1, 4), (2, 3), (3, 3), (7, 1), (8, 0), (100, 0)])
def test_exactly_what_no_later_token_sees(window, gone):
    manager = make_manager(page_size=2)
    seq = manager.open([], window=window)
    grow(seq, list(range(8)))
    assert seq.num_pages_given_back == gone


def test_prefixes_are_published_while_all_of_it_is_inside():
    manager = make_manager(num_pages=20)
    short = manager.open([], window=4)
    grow(short, [1, 2, 3, 4])
    assert manager.open([1, 2, 3, 4]).num_cached_tokens == 4
    long = manager.open([], window=4)
    grow(long, [7, 7, 7, 7, 7, 7])
    assert manager.open([7] * 6).num_cached_tokens == 0


def test_a_hit_stays_locked_until_the_window_has_left_it():
    manager = make_manager(num_pages=20)
    first = manager.open([])
    grow(first, [1] * 8)
    first.close()
    seq = manager.open([1] * 8, window=3)
    assert seq.page_ids == (0, 1, 2, 3)
    grow(seq, [2])
    assert seq.page_ids == (-1, -1, -1, 3, 4)
    assert manager.num_evictable_pages == 0
    grow(seq, [2, 2])
    assert manager.num_evictable_pages == 4
    assert manager.open([1] * 8).num_cached_tokens == 8


def test_truncate_needs_the_pages_that_are_left():
    manager = make_manager()
    seq = manager.open([], window=3)
    grow(seq, [1, 2, 3, 4, 5])
    seq.append(2)
    seq.truncate(5)
    seq.truncate(4)
    with pytest.raises(
        ValueError, match="must be at least 4, whose window begins behind the pages that were given back"
    ):
        seq.truncate(3)


def test_forks_share_what_is_left():
    manager = make_manager()
    seq = manager.open([], window=3)
    grow(seq, [1, 2, 3, 4, 5])
    child = seq.fork()
    assert (child.page_ids, child.window, child.num_pages_given_back) == ((-1, 1, 2), 3, 1)
    seq.close()
    grow(child, [9, 9])
    assert child.page_ids == (-1, -1, 2, 0)


def test_tables_of_windows():
    manager = make_manager()
    seq = manager.open([], window=3)
    grow(seq, [1, 2, 3, 4, 5])
    step = manager.batch([seq])
    assert step.seq_lens.tolist() == [6]
    assert step.dense_table().tolist() == [[-1, 1, 2]]
    assert step.page_table.indices.tolist() == manager.page_table([seq]).indices.tolist() == [0, 1, 2]
    assert step.slot_mapping.tolist() == [5]


def test_swapped_windows_come_back():
    class Tier:
        def save(self, pages):
            assert pages.tolist() == [1, 2]
            return 1

        def load(self, ticket, pages):
            self.loaded = pages.tolist()

        def drop(self, ticket):
            pass

    manager, tier = make_manager(), Tier()
    seq = manager.open([], window=3)
    grow(seq, [1, 2, 3, 4, 5])
    manager.swap_out(seq, tier)
    assert manager.num_free_pages == 6
    manager.swap_in(seq)
    assert seq.page_ids == (-1, *tier.loaded)


@pytest.mark.parametrize("window, error", [(0, ValueError), (2.0, TypeError)])
def test_window_is_checked(window, error):
    with pytest.raises(error, match="window must be"):
        make_manager().open([], window=window)


def make_windowed(num_pages=20, **options):
    return KVCacheManager(num_pages, page_size=2, window=5, debug=True, **options)


def test_a_manager_of_one_window_finds_prompts_of_any_length_by_what_the_window_sees():
    manager = make_windowed()
    ids = list(range(17))
    seq = manager.open(ids)
    for token in ids:
        seq.append(1)
        seq.commit([token])
    assert [page >= 0 for page in seq.page_ids] == [False] * 6 + [True] * 3
    seq.close()
    again = manager.open(ids)
    assert again.num_cached_tokens == 16
    assert [page >= 0 for page in again.page_ids] == [False] * 6 + [True] * 2
    again.append(1)
    again.commit([16])
    fork = again.fork()
    again.append(1)
    fork.append(1)
    assert again.page_ids[-1] != fork.page_ids[-1]
    # The pages of the last window stay while somebody has it open; the others go first.
    assert manager.evict() == 6
    assert manager.open(ids).num_cached_tokens == 16


def test_what_was_published_can_be_taken_back_as_far_as_its_window_is_there():
    manager = KVCacheManager(20, page_size=2, window=4, debug=True)
    seq = manager.open([])
    seq.append(12)
    seq.commit(list(range(12)))
    seq.truncate(11)
    seq.append(1)
    src, dst = manager.take_copies()
    assert src.shape == dst.shape == (1,)
    seq.commit([99])
    assert manager.open([*range(11), 99]).num_cached_tokens == 12
    assert manager.open(list(range(12))).num_cached_tokens == 12
    with pytest.raises(ValueError, match=r"num_tokens must be at least 11, whose window begins behind"):
        seq.truncate(5)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": "5"}, TypeError, "window must be an int"),
        (
            {"window": 5, "prefix_cache": HashedPageCache(2, window=6)},
            ValueError,
            r"must have window 5 \(the manager's\)",
        ),
        ({"prefix_cache": HashedPageCache(2, window=6)}, ValueError, r"must have window None \(the manager's\)"),
    ],
)
def test_windows_of_a_manager_are_checked(options, error, words):
    with pytest.raises(error, match=words):
        KVCacheManager(4, page_size=2, **options)


def test_a_cache_of_whole_prefixes_serves_a_manager_of_one_window():
    manager = make_windowed(prefix_cache="radix")
    seq = manager.open([])
    for token in range(9):
        seq.append(1)
        seq.commit([token])
    seq.close()
    assert manager.open(list(range(9))).num_cached_tokens == 4
