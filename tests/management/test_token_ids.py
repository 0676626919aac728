import numpy as np
import pytest
import torch

from pagedkv.management.token_ids import as_token_ids


@pytest.mark.parametrize(
    "given",
    [
        [3, 0, 2**40],
        (3, 0, 2**40),
        np.array([3, 0, 2**40]),
        torch.tensor([3, 0, 2**40]),
        np.array([3, 9, 0, 9, 2**40])[::2],
    ],
    ids=["list", "tuple", "numpy", "torch", "strided"],
)
def test_every_form_becomes_int64(given):
    ids = as_token_ids("token_ids", given)
    assert ids.tolist() == [3, 0, 2**40]
    assert ids.dtype == np.int64
    assert ids.flags.c_contiguous


@pytest.mark.parametrize("given", [np.array([1], np.int32), torch.tensor([1], dtype=torch.int32), range(1, 2)])
def test_int32_and_ranges_are_taken(given):
    assert as_token_ids("token_ids", given).tolist() == [1]


@pytest.mark.parametrize("given", [[], (), np.empty(0, np.int64), torch.empty(0, dtype=torch.int64)])
def test_no_tokens(given):
    assert as_token_ids("token_ids", given).shape == (0,)


@pytest.mark.parametrize(
    "given, message",
    [
        ("abc", "must be a list of ints, a numpy array or a torch tensor, got str"),
        ({1}, "got set"),
        (None, "got NoneType"),
        ([1, 2.5], "must be ints, got float"),
        (["a"], "must be ints, got str"),
        ([True, False], "must be ints, got bool"),
        ([1, None], "must be ints, got NoneType"),
        ([[1], [2, 3]], "must be a flat list of ints"),
        (np.array([1.0]), "must have dtype int32 or int64, got float64"),
        (np.array([1], np.int16), "must have dtype int32 or int64, got int16"),
        (torch.tensor([1.0]), "must have dtype int32 or int64, got float32"),
        (torch.tensor([1], dtype=torch.uint8), "must have dtype int32 or int64, got uint8"),
    ],
)
def test_wrong_types_are_refused(given, message):
    with pytest.raises(TypeError, match=message):
        as_token_ids("token_ids", given)


@pytest.mark.parametrize(
    "given, message",
    [
        ([1, -2], "must be 0 or more, got -2 at position 1"),
        ([2**63], "must be below 2\\*\\*63"),
        ([2**80, 1], "must be below 2\\*\\*63"),
        (np.array([[1]]), r"must have shape \[n\], got \[1, 1\]"),
        ([[1, 2]], r"must have shape \[n\], got \[1, 2\]"),
        (torch.tensor([1], device="meta"), "must be on the CPU, got meta"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        as_token_ids("token_ids", given)
