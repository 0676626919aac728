import numpy as np

from pagedkv import KVCacheManager
from pagedkv.management.sequence_rows import SequenceRows


def test_every_change_gives_a_version_that_no_other_state_has():
    rows = SequenceRows()
    seen = set()
    for _ in range(40):
        row = rows.add(np.array([1], np.int32), np.array([7], np.int32))
        seen.add(int(rows.version[row]))
        if row % 2:
            rows.remove(row)
            seen.add(int(rows.version[row]))
    assert len(seen) == rows.epoch


def test_a_row_that_is_used_again_begins_empty():
    rows = SequenceRows()
    row = rows.add(np.array([1, 2], np.int32), np.array([7], np.int32))
    rows.num_tokens[row], rows.first_page[row], rows.is_new[row] = 9, 1, False
    rows.remove(row)
    assert rows.add(np.empty(0, np.int32), np.empty(0, np.int32)) == row
    assert (rows.num_tokens[row], rows.first_page[row], rows.is_new[row]) == (0, 0, True)
    assert (rows.tokens.size[row], rows.pages.size[row]) == (0, 0)


def test_token_ids_beyond_32_bits_are_kept():
    manager = KVCacheManager(8, page_size=2)
    first, second = manager.open([]), manager.open([])
    first.append(2)
    first.commit([1, 2])
    assert manager.ledger.rows.tokens.flat.dtype == np.int32
    second.append(2)
    second.commit([2**40, 3])
    assert (first.token_ids, second.token_ids) == ((1, 2), (2**40, 3))
    assert manager.open([2**40, 3]).num_cached_tokens == 2
