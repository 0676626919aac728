"""fast_compare_key: what a loop over the tokens finds."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pagedkv
from pagedkv.kernels import compare_key


@pytest.fixture(autouse=True, params=["numpy", pytest.param("native", marks=pytest.mark.native)])
def path(request, monkeypatch):
    """Which of the two compares; without a native core it is always numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(compare_key, "_native_function", lambda: lambda a, b: -1)
    else:
        # What was there at the first call of the process is kept.
        compare_key._native_function.cache_clear()
        assert compare_key._native_function()(np.arange(3), np.arange(2)) == 2


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9))
def test_fast_compare_key_equals_a_loop(a, b):
    left, right = np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)
    assert pagedkv.fast_compare_key(left, right) == naive(a, b)
    assert pagedkv.fast_compare_key(left, torch.tensor(b, dtype=torch.int64)) == naive(a, b)


def test_fast_compare_key_of_strided_and_of_read_only_tokens():
    tokens = np.arange(12)
    tokens.setflags(write=False)
    assert pagedkv.fast_compare_key(tokens[::2], np.array([0, 2, 4, 7])) == 3
    assert pagedkv.fast_compare_key(tokens, np.arange(12)) == 12
    assert pagedkv.fast_compare_key(torch.arange(12)[::2], torch.tensor([0, 2, 4, 7])) == 3


def test_fast_compare_key_of_unaligned_tokens_and_of_other_byte_orders():
    tokens = np.array([1, 2, 3, 2**30], np.int32)
    odd = np.frombuffer(b"x" + tokens.tobytes(), np.int32, offset=1)
    assert not odd.flags.aligned
    assert pagedkv.fast_compare_key(odd, tokens) == pagedkv.fast_compare_key(tokens, odd) == 4
    with pytest.raises(TypeError, match="a must have dtype int32 or int64, got >i4"):
        pagedkv.fast_compare_key(tokens.astype(">i4"), tokens)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_fast_compare_key_of_nothing_and_of_negative_tokens(dtype):
    none, tokens = np.array([], dtype), np.array([-1, -2, 5], dtype)
    assert pagedkv.fast_compare_key(none, tokens) == pagedkv.fast_compare_key(tokens, none) == 0
    assert pagedkv.fast_compare_key(none, none) == 0
    assert pagedkv.fast_compare_key(tokens, np.array([-1, -2, -5], dtype)) == 2


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
