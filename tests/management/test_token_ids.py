import numpy as np
import pytest
import torch

from pagedkv.management.token_ids import as_plain_token_array, as_token_array, as_token_ids


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


class OtherTensor:
    """A tensor of a library that is not torch or numpy."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


def test_tensors_of_other_libraries_are_taken():
    array = np.array([1, 2], np.int32)
    assert as_token_ids("token_ids", OtherTensor(array)).tolist() == [1, 2]
    assert np.shares_memory(as_token_array("token_ids", OtherTensor(array)), array)
    with pytest.raises(ValueError, match="token_ids must be on the CPU, got a OtherTensor on another device"):
        as_token_ids("token_ids", OtherTensor(array, (2, 0)))
    with pytest.raises(TypeError, match="token_ids must have dtype int32 or int64, got float32"):
        as_token_ids("token_ids", OtherTensor(np.zeros(1, np.float32)))
    with pytest.raises(TypeError, match="token_ids must have dtype int32 or int64, got a OtherTensor: "):
        as_token_ids("token_ids", OtherTensor(np.array([1], ">i4")))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_plain_arrays_are_not_copied(dtype):
    array = np.array([1, 2], dtype)
    assert np.shares_memory(as_plain_token_array("token_ids", array), array)
    array.flags.writeable = False
    copied = as_plain_token_array("token_ids", array)
    assert copied.flags.writeable
    assert copied.dtype == dtype
    swapped = as_plain_token_array("token_ids", np.array([1, 2], np.dtype(dtype).newbyteorder()))
    assert swapped.dtype.isnative
    assert swapped.tolist() == [1, 2]
