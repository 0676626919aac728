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


def test_a_reader_who_never_comes_costs_no_more_than_the_limit():
    """The log forgets what it cannot keep, and says so first: what is believed afterwards is held."""
    log = EventLog(max_pending=20)
    believed, cleared = set(), 0
    held = []
    for page in range(100):
        stored(log, held[-1] if held else None, [page], [page, page])
        held.append(page)
        if len(held) > 5:
            log.removed(pages(held.pop()))
        assert log._num_pending <= 20
        if page % 30 == 29:
            for event in log.take():
                if isinstance(event, AllBlocksCleared):
                    believed.clear()
                    cleared += 1
                elif isinstance(event, BlockStored):
                    believed |= set(event.block_hashes)
                else:
                    believed -= set(event.block_hashes)
            assert believed <= {short_hash(digest) for digest in log._digests.values()}
    assert cleared == 3
    assert log.num_pages == 5


def test_what_never_fits_is_forgotten_with_the_rest():
    log = EventLog(max_pending=5)
    stored(log, None, [0], [1, 2])
    stored(log, 0, [1, 2], [3, 4, 5, 6])
    assert log.take() == [AllBlocksCleared()]
    log.removed(pages(2))
    assert log.take() == [BlockRemoved(hashes([1, 2, 3, 4, 5, 6], 2)[2:])]


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
