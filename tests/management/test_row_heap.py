import numpy as np

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
    heap.reserve(1, 900)
    assert heap.num_bytes == num_bytes
    assert rows_of(heap) == [list(range(10)), list(range(5))]


def test_rows_are_added():
    heap = make_heap([3])
    heap.add_rows(2)
    heap.extend(2, np.array([4], np.int32))
    assert rows_of(heap) == [[3], [], [4]]
