"""fast_compare_key: what a loop over the tokens finds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pagedkv


def naive(a, b):
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("length", [1, 16, 4095, 4096, 4097, 20480, 20481, 70000])
def test_fast_compare_key_finds_a_difference_anywhere(length, dtype):
    tokens = np.random.randint(0, 50000, length).astype(dtype)
    assert pagedkv.fast_compare_key(tokens, tokens.copy()) == length
    for place in sorted({0, length // 2, length - 1}):
        other = tokens.copy()
        other[place] ^= 1 << 30
        assert pagedkv.fast_compare_key(tokens, other) == place
        assert pagedkv.fast_compare_key(torch.from_numpy(other), torch.from_numpy(tokens)) == place


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_fast_compare_key_equals_a_loop(a, b):
    left, right = np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)
    assert pagedkv.fast_compare_key(left, right) == naive(a, b)
    assert pagedkv.fast_compare_key(left, torch.tensor(b, dtype=torch.int64)) == naive(a, b)


def test_fast_compare_key_of_strided_and_of_read_only_tokens():
    tokens = np.arange(12)
    tokens.setflags(write=False)
    assert pagedkv.fast_compare_key(tokens[::2], np.array([0, 2, 4, 7])) == 3


@pytest.mark.parametrize(
    "a, b, error, message",
    [
        ([1, 2], np.zeros(2, np.int64), TypeError, "a must be a numpy array or a torch tensor, got list"),
        (np.zeros(2), np.zeros(2), TypeError, "a must have dtype int32 or int64, got float64"),
        (np.zeros(2, np.int64), np.zeros(2, np.int32), TypeError, "b must have the dtype of a, int64, got int32"),
        (np.zeros(2, np.int64), np.zeros(2, np.uint64), TypeError, "b must have dtype int32 or int64, got uint64"),
        (np.zeros((2, 1), np.int64), np.zeros(2, np.int64), ValueError, r"a must have shape \[n\], got \[2, 1\]"),
        (np.zeros(2, np.int64), torch.zeros(2, device="meta").long(), ValueError, "b must be on the CPU, got meta"),
    ],
)
def test_fast_compare_key_refuses(a, b, error, message):
    with pytest.raises(error, match=message):
        pagedkv.fast_compare_key(a, b)
