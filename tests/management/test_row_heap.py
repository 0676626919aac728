import sys
from pathlib import Path

import numpy as np
import pytest

from pagedkv.management import row_heap
from pagedkv.management.row_heap import RowHeap


def make_heap(*rows):
    heap = RowHeap(len(rows), np.int32)
    for number, row in enumerate(rows):
        heap.extend(number, np.array(row, np.int32))
    return heap


def rows_of(heap):
    return [heap.view(row).tolist() for row in range(heap.size.shape[0])]


def test_rows_grow_apart():
    heap = make_heap([], [])
    for value in range(100):
        heap.extend(value % 2, np.array([value], np.int32))
    assert rows_of(heap) == [list(range(0, 100, 2)), list(range(1, 100, 2))]
    assert heap.view(1, 3, 5).tolist() == [7, 9]


def test_one_value_each_also_where_a_chunk_is_full():
    heap = make_heap(range(16), [], range(3))
    heap.append_each(np.array([2, 0]), np.array([7, 8], np.int32))
    assert rows_of(heap) == [[*range(16), 8], [], [0, 1, 2, 7]]


def test_several_values_each():
    heap = make_heap([1], range(15), [])
    heap.extend_each(np.array([1, 2]), np.array([3, 1]), np.array([5, 6, 7, 8], np.int32))
    assert rows_of(heap) == [[1], [*range(15), 5, 6, 7], [8]]


def test_put_beyond_the_size_does_not_count_yet():
    heap = make_heap([1, 2])
    heap.put(0, 2, np.arange(40, dtype=np.int32))
    assert rows_of(heap) == [[1, 2]]
    assert heap.view(0, 2, 4).tolist() == [0, 1]


def test_chunks_are_used_again():
    heap = make_heap(range(1000), range(5))
    num_bytes = heap.num_bytes
    for _ in range(20):
        heap.clear(0)
        heap.extend(0, np.arange(1000, dtype=np.int32))
    heap.truncate(0, 10)
    heap.extend(1, ints(), 900)
    assert heap.num_bytes == num_bytes
    assert rows_of(heap) == [list(range(10)), list(range(5))]


def test_rows_are_added():
    heap = make_heap([3])
    heap.add_rows(2)
    heap.extend(2, np.array([4], np.int32))
    assert rows_of(heap) == [[3], [], [4]]


def ints(*values):
    return np.array(values, np.int32)


def snapshot_of(heap, rows):
    rows = np.array(rows, np.int64)
    return heap.snapshot(rows, heap.size[rows].astype(np.int32))


def rows_read(snapshot):
    indptr, values = snapshot.read()
    return [row.tolist() for row in np.split(values, indptr[1:-1])]


CHANGES = {
    "put": lambda heap: heap.put(1, 0, ints(9)),
    "truncate": lambda heap: (heap.truncate(1, 1), heap.extend(1, ints(8, 8))),
    "clear": lambda heap: (heap.clear(1), heap.extend(2, ints(*range(20))), heap.extend(1, ints(5))),
    "lengthen": lambda heap: (heap.extend(1, ints(*range(40))), heap.append_each(np.array([0, 1]), ints(6, 6))),
    "all": lambda heap: [heap.clear(row) for row in range(3)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_is_what_the_rows_were(change):
    heap = make_heap([1, 2, 3], [4, 5, 6], [7])
    before = snapshot_of(heap, [2, 1])
    CHANGES[change](heap)
    later = snapshot_of(heap, [2, 1])
    expected = [heap.view(2).tolist(), heap.view(1).tolist()]
    heap.truncate(1, 0)
    heap.truncate(2, 0)
    assert rows_read(before) == [[7], [4, 5, 6]]
    assert rows_read(later) == expected
    assert before.read()[1] is before.read()[1]


def test_a_snapshot_reads_entries_below_0_as_0():
    heap = make_heap([-1, -1, 3], [4], [-1, 5])
    snapshot = snapshot_of(heap, [0, 1, 2])
    heap.clear(2)
    assert rows_read(snapshot) == [[0, 0, 3], [4], [0, 5]]


def test_a_row_longer_than_all_that_is_left_of_the_buffer_is_read():
    heap = make_heap([1], range(500))
    snapshot = snapshot_of(heap, [1, 0])
    heap.clear(1)
    heap.put(0, 0, ints(7))
    assert rows_read(snapshot) == [list(range(500)), [1]]


def test_snapshots_that_are_read_or_gone_are_not_kept_up():
    heap = make_heap([1, 2], [3])
    read, gone = snapshot_of(heap, [0, 1]), snapshot_of(heap, [0, 1])
    assert len(heap._snapshots) == 2
    read.read()
    del gone
    assert not heap._snapshots
    assert rows_read(snapshot_of(heap, [])) == [[]]


FULL = 16
INTERRUPTED = {
    "extend": lambda heap: heap.extend(0, ints(*range(50))),
    "extend in a freed chunk": lambda heap: (heap.clear(3), heap.extend(0, ints(*range(3)))),
    "put": lambda heap: heap.put(1, 2, ints(*range(100, 130))),
    "put inside": lambda heap: heap.put(1, 0, ints(77)),
    "extend and more": lambda heap: heap.extend(2, ints(4), 100),
    "truncate": lambda heap: heap.truncate(3, 2),
    "clear": lambda heap: heap.clear(3),
    "append_each": lambda heap: heap.append_each(np.array([0, 3, 1]), ints(5, 6, 7)),
    "extend_each": lambda heap: heap.extend_each(np.array([0, 1]), np.array([3, 20]), ints(*range(23))),
    "add_rows": lambda heap: heap.add_rows(3),
}


def heap_to_interrupt():
    heap = make_heap(range(FULL), [1, 2, 3], [], range(200, 200 + 8 * FULL))
    return heap, snapshot_of(heap, [0, 1, 3])


def run_interrupted(call, number):
    """Runs `call` with a KeyboardInterrupt before the n-th bytecode in row_heap.py; False when there are fewer."""
    left = [number]

    def trace(frame, event, _):
        if Path(frame.f_code.co_filename) != Path(row_heap.__file__):
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


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_at_any_bytecode_leaves_each_row_as_before_or_after(name):
    heap, _ = heap_to_interrupt()
    before = rows_of(heap)
    INTERRUPTED[name](heap)
    after, number = rows_of(heap), 0
    while True:
        heap, snapshot = heap_to_interrupt()
        was_interrupted = run_interrupted(lambda heap=heap: INTERRUPTED[name](heap), number)
        rows = rows_of(heap)
        assert all(row in (old, new) for row, old, new in zip(rows, before, after, strict=False)), (number, rows)
        # No two rows share an entry, however they go on.
        heap.add_rows(1)
        for row in range(heap.num_rows):
            heap.extend(row, np.full(40, row, np.int32))
        assert rows_of(heap)[:4] == [[*old, *[row] * 40] for row, old in enumerate(rows[:4])], number
        assert rows_read(snapshot) == [before[0], before[1], before[3]], number
        if not was_interrupted:
            break
        number += 1
    assert number > 5
