import numpy as np

from pagedkv.management.growing_array import GrowingArray


def test_extend_and_truncate_keep_the_entries():
    array = GrowingArray(np.arange(3))
    for start in range(3, 200):
        array.extend(np.array([start]))
    assert array.view().tolist() == list(range(200))
    array.truncate(7)
    assert array.view(2).tolist() == [2, 3, 4, 5, 6]
    array.extend(np.array([99]))
    assert array.view(5, 8).tolist() == [5, 6, 99]


def test_memory_is_given_back():
    array = GrowingArray(np.zeros(100_000, np.int64))
    array.truncate(10)
    assert array.num_bytes <= 8 * (4 * 10 + 16)


def test_what_is_passed_in_is_copied():
    values = np.arange(3)
    array = GrowingArray(values)
    values[:] = 7
    assert array.view().tolist() == [0, 1, 2]


def test_put_beyond_the_end_does_not_count_yet():
    array = GrowingArray(np.arange(2))
    array.put(2, np.array([5, 6]))
    assert array.view().tolist() == [0, 1]
    assert array.view(0, 4).tolist() == [0, 1, 5, 6]
