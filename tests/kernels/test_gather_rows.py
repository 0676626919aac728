import numpy as np
import pytest

from pagedkv.kernels import gather_rows as module
from pagedkv.kernels.cpu import native

FUNCTIONS = [module._gather, module._function()]


def gathered(function, flat, starts, sizes):
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    values = np.full(indptr[-1], -7, np.int32)
    function(np.array(flat, np.int32), np.array(starts, np.int64), indptr, values)
    return values.tolist()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_one_behind_the_other(function):
    assert gathered(function, range(10), [7, 0, 3], [3, 0, 2]) == [7, 8, 9, 3, 4]
    assert gathered(function, range(10), [], []) == []
    assert gathered(function, [], [0, 0], [0, 0]) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_entries_below_0_are_read_as_0(function):
    flat = np.arange(-100, 200)
    assert gathered(function, flat, [5, 90], [40, 60]) == np.maximum(np.r_[flat[5:45], flat[90:150]], 0).tolist()


@pytest.mark.native
@pytest.mark.parametrize(
    ("starts", "indptr", "num_values"),
    [
        ([8], [0, 3], 3),
        ([-1], [0, 1], 1),
        ([0, 0], [0, 3, 1], 1),
        ([0, 0], [0, 9, 2], 2),
        ([0], [0, 3], 2),
        ([0], [0], 0),
    ],
)
def test_the_native_core_reads_and_writes_nothing_out_of_bounds(starts, indptr, num_values):
    values = np.full(num_values, -7, np.int32)
    with pytest.raises(ValueError, match="must"):
        native.core().gather_rows(
            np.arange(10, dtype=np.int32), np.array(starts, np.int64), np.array(indptr, np.int32), values
        )
