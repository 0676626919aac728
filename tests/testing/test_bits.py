"""same_bits: what it tells apart, and tensors without a number."""

import pytest
import torch

from pagedkv.testing.bits import same_bits


def test_nan_equals_itself_and_zeros_of_unlike_sign_differ():
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_shape_and_dtype_are_compared():
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))
    assert not same_bits(torch.zeros(2, dtype=torch.int32), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_empty_tensors_of_any_strides(dtype):
    standing = torch.empty(0, dtype=dtype).as_strided((0,), (0,))
    assert same_bits(standing, torch.empty(0, dtype=dtype))
    assert not same_bits(standing, torch.empty(0, 3, dtype=dtype))
