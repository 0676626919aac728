import sys
from pathlib import Path

import numpy as np
import pytest

from pagedkv import KVCacheManager
from pagedkv.management import row_heap, sequence_rows
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


def added(rows, value):
    return rows.add(np.full(value, value, np.int32), np.full(20, value, np.int32), 30)


def run_interrupted(call, number):
    """Runs `call` with a KeyboardInterrupt before the n-th bytecode of the books; False when there are fewer."""
    files, left = {Path(row_heap.__file__), Path(sequence_rows.__file__)}, [number]

    def trace(frame, event, _):
        if Path(frame.f_code.co_filename) not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


@pytest.mark.parametrize("num_live", [3, 16])
@pytest.mark.parametrize("name", ["add", "remove"])
def test_an_interrupt_at_any_bytecode_leaves_the_rows_of_others(name, num_live):
    number = 0
    while True:
        rows = SequenceRows()
        live = {added(rows, value): value for value in range(1, num_live + 1)}
        call = {"add": lambda rows=rows: added(rows, 60), "remove": lambda rows=rows: rows.remove(2)}[name]
        was_interrupted = run_interrupted(call, number)
        if name == "remove":
            # A row that was not given back wholly is given back once more, or by nobody.
            del live[2]
        new = {added(rows, value): value for value in range(100, 120)}
        assert len(new) == 20
        assert not live.keys() & new.keys()
        for row, value in (live | new).items():
            assert rows.tokens.view(row).tolist() == [value] * value, number
            assert rows.pages.view(row).tolist() == [value] * 20, number
            assert (rows.num_tokens[row], rows.window[row], rows.is_new[row]) == (0, 0, True)
        if not was_interrupted:
            break
        number += 1
    assert number > 20
