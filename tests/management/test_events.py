import weakref
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from pagedkv.management.events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog
from pagedkv.management.page_hash import digest_pages, namespace_digest, short_hash


def pages(*ids):
    return np.array(ids, np.int32)


def hashes(token_ids, page_size, namespace=None):
    digests = digest_pages(namespace_digest(namespace), np.array(token_ids, np.int64), page_size)
    return tuple(map(short_hash, digests))


def stored(log, parent, page_ids, token_ids, namespace=None, page_size=2):
    log.stored(parent, pages(*page_ids), np.array(token_ids, np.int64), namespace, page_size)


def test_fields_are_named_and_ordered_as_routers_expect_them():
    names = "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys".split()  # noqa: SIM905
    assert [field.name for field in fields(BlockStored)] == names
    assert [field.name for field in fields(BlockRemoved)] == ["block_hashes", "medium"]
    assert not fields(AllBlocksCleared)
    with pytest.raises(FrozenInstanceError):
        AllBlocksCleared().time = 1


def test_stored_then_removed():
    log = EventLog()
    stored(log, None, [7, 5], [1, 2, 3, 4])
    stored(log, 7, [6], [9, 9])
    log.removed(pages(6, 5))
    usual, branch = hashes([1, 2, 3, 4], 2), hashes([1, 2, 9, 9], 2)
    assert log.take() == [
        BlockStored(usual, None, (1, 2, 3, 4), 2),
        BlockStored(branch[1:], usual[0], (9, 9), 2),
        BlockRemoved((branch[1], usual[1])),
    ]
    assert log.take() == []
    assert log.num_pages == 1


def test_a_page_that_comes_back_has_the_hash_of_its_new_tokens():
    log = EventLog()
    stored(log, None, [3], [1, 2])
    log.removed(pages(3))
    stored(log, None, [3], [8, 8], namespace="a")
    log.removed(pages(3))
    events = log.take()
    assert [event.block_hashes for event in events] == [hashes([1, 2], 2)] * 2 + [hashes([8, 8], 2, "a")] * 2
    assert events[2].extra_keys == (("a",),)


def test_cleared_makes_what_was_pending_void():
    log = EventLog()
    stored(log, None, [3], [1, 2])
    log.cleared()
    assert log.num_pages == 0
    stored(log, None, [3], [1, 2])
    assert log.take() == [AllBlocksCleared(), BlockStored(hashes([1, 2], 2), None, (1, 2), 2)]


def test_numbers_are_those_of_python():
    log = EventLog()
    stored(log, None, [3], [1, 2])
    (event,) = log.take()
    assert {type(number) for number in (*event.block_hashes, *event.token_ids, event.block_size)} == {int}


def test_arrays_of_the_caller_are_copied():
    log = EventLog()
    token_ids, page_ids = np.array([1, 2]), pages(3)
    log.stored(None, page_ids, token_ids, None, 2)
    token_ids[:], page_ids[:] = 9, 9
    log.removed(pages(3))
    assert log.take()[0].token_ids == (1, 2)


def test_nothing_is_no_event():
    log = EventLog()
    stored(log, None, [], [])
    log.removed(pages())
    assert log.take() == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda log: stored(log, 4, [5], [1, 2]), "parent_page must be stored, got page 4, which is not"),
        (lambda log: stored(log, 4, [], []), "parent_page must be stored, got page 4"),
        (lambda log: stored(log, None, [5, 3], [1, 2, 3, 4]), "pages must not be stored already, got page 3"),
        (lambda log: stored(log, None, [5, 5], [1, 2, 3, 4]), "pages must be different, got page 5 twice"),
        (lambda log: stored(log, None, [5], [1, 2, 3]), r"token_ids must have shape \[2\] for 1 pages of 2, got \[3\]"),
        (lambda log: log.removed(pages(3, 4)), "pages must be stored, got page 4, which is not"),
        (lambda log: log.removed(pages(3, 3)), "pages must be different, got page 3 twice"),
    ],
)
def test_wrong_calls_change_nothing(call, message):
    log = EventLog()
    stored(log, None, [3], [1, 2])
    with pytest.raises(ValueError, match=message):
        call(log)
    assert log.num_pages == 1
    assert len(log.take()) == 1
    log.removed(pages(3))
    assert log.take() == [BlockRemoved(hashes([1, 2], 2))]


def read(events, believed):
    """What a reader does with events, in order; refuses those that name what it was not told of."""
    for event in events:
        if isinstance(event, AllBlocksCleared):
            believed.clear()
        elif isinstance(event, BlockStored):
            assert event.parent_block_hash is None or event.parent_block_hash in believed
            assert not believed & set(event.block_hashes)
            believed |= set(event.block_hashes)
        else:
            assert believed >= set(event.block_hashes)
            believed -= set(event.block_hashes)


def test_a_reader_who_never_comes_costs_no_more_than_the_limit():
    """The log forgets what it cannot keep; without its cache it tells then what continues nothing that it forgot."""
    log = EventLog(max_pending=20)
    believed, held = set(), {}
    num_cleared = num_believed = 0
    for page in range(100):
        # Prompts of up to three pages.
        word = list(range(page // 3 * 3, page + 1))
        ids = [number for number in word for _ in range(2)]
        stored(log, page - 1 if len(word) > 1 else None, [page], ids[-2:])
        held[page] = hashes(ids, 2)[-1]
        if page % 3 == 2 and page > 5:
            gone = range(page - 5, page - 2)
            log.removed(pages(*gone))
            for number in gone:
                del held[number]
        assert log._num_pending <= 20
        if page % 14 == 13:
            events = log.take()
            num_cleared += events.count(AllBlocksCleared())
            read(events, believed)
            assert believed <= set(held.values())
            num_believed += len(believed)
    assert min(num_cleared, num_believed) > 3
    log.cleared()
    read(log.take(), believed)
    assert believed == set()


def test_what_never_fits_is_forgotten_with_the_rest():
    log = EventLog(max_pending=5)
    stored(log, None, [0], [1, 2])
    stored(log, 0, [1, 2], [3, 4, 5, 6])
    assert log.take() == [AllBlocksCleared()]
    log.removed(pages(2))
    stored(log, 1, [3], [9, 9])
    assert log.take() == []
    stored(log, None, [4], [8, 8])
    assert log.take() == [BlockStored(hashes([8, 8], 2), None, (8, 8), 2)]


class Shelf:
    """A cache that a log can ask: nodes as they are told."""

    class Run:
        def __init__(self, parent, ids, page_ids, namespace=None):
            self.parent, self.namespace = parent, namespace
            self.tokens, self.pages = np.array(ids, np.int64), pages(*page_ids)

    page_size = 2

    def __init__(self):
        root, other = self.Run(None, [], []), self.Run(None, [], [], "other")
        first = self.Run(root, [1, 2, 3, 4], [0, 1])
        self.runs = [root, other, first, self.Run(first, [5, 6], [2]), self.Run(other, [1, 2], [3])]

    @property
    def num_cached_pages(self):
        return sum(run.pages.size for run in self.runs)

    def nodes(self):
        return iter(self.runs)


ALL_OF_SHELF = [
    AllBlocksCleared(),
    BlockStored(hashes([1, 2, 3, 4], 2), None, (1, 2, 3, 4), 2),
    BlockStored(hashes([1, 2, 3, 4, 5, 6], 2)[2:], hashes([1, 2, 3, 4], 2)[1], (5, 6), 2),
    BlockStored(hashes([1, 2], 2, "other"), None, (1, 2), 2, extra_keys=(("other",),)),
]


def test_a_log_that_cannot_tell_what_happened_tells_what_is_cached():
    shelf = Shelf()
    log = EventLog(cache=shelf)
    assert log.take() == ALL_OF_SHELF
    assert (log.take(), log.num_pages) == ([], 4)
    log.resync()
    log.removed(pages(9))
    stored(log, 8, [7], [1, 2])
    assert log.take() == ALL_OF_SHELF
    gone = shelf.runs.pop()
    log.removed(gone.pages)
    assert log.take() == [BlockRemoved(ALL_OF_SHELF[-1].block_hashes)]
    with pytest.raises(ValueError, match="pages must be stored, got page 3, which is not"):
        log.removed(gone.pages)
    shelf.runs.clear()
    assert log.take() == [AllBlocksCleared()]


def test_a_log_with_a_cache_forgets_and_tells_all_again():
    shelf = Shelf()
    log = EventLog(max_pending=10, cache=shelf)
    log.take()
    stored(log, 1, [4, 5], [7, 7, 8, 8])
    stored(log, 5, [6, 7], [7, 7, 8, 8])
    assert (log._num_pending, log.num_pages) == (0, 0)
    shelf.runs.append(shelf.Run(shelf.runs[2], [7, 7, 8, 8, 7, 7, 8, 8], range(4, 8)))
    longest = hashes([1, 2, 3, 4, 7, 7, 8, 8, 7, 7, 8, 8], 2)
    assert log.take() == [*ALL_OF_SHELF, BlockStored(longest[2:], longest[1], (7, 7, 8, 8, 7, 7, 8, 8), 2)]


def test_a_log_does_not_keep_its_cache():
    shelf = Shelf()
    log, watch = EventLog(cache=shelf), weakref.ref(shelf)
    log.resync()
    del shelf
    assert watch() is None
    assert log.take() == [AllBlocksCleared()]


def test_memory_follows_the_pages_held():
    log = EventLog()
    for _ in range(50):
        stored(log, None, range(100), range(200))
        log.removed(pages(*range(100)))
        log.take()
    assert (log.num_pages, len(log._digests), log._num_pending) == (0, 0, 0)


def test_max_pending_must_be_positive():
    with pytest.raises(ValueError, match="max_pending must be at least 1, got 0"):
        EventLog(max_pending=0)
