import numpy as np
import torch

from pagedkv.kernels.upload import aligned_offsets, uploaded, uploaded_together


def test_on_the_cpu_nothing_is_copied():
    arrays = [np.arange(5, dtype=np.int32), np.zeros((2, 3), np.int32)]
    tensors = [uploaded(arrays[0], torch.device("cpu")), *uploaded_together(arrays, torch.device("cpu"))]
    arrays[0][2] = arrays[1][1, 2] = 77
    assert [tensor.flatten()[-1].item() for tensor in tensors] == [4, 4, 77]
    assert [tensor.flatten()[2].item() for tensor in tensors[:2]] == [77, 77]


def test_elsewhere_arrays_go_together_and_keep_their_shapes():
    shapes = [(3,), (0, 5), (2, 5), (0,), (17,)]
    tensors = uploaded_together([np.zeros(shape, np.int32) for shape in shapes], torch.device("meta"))
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert [tensor.storage_offset() for tensor in tensors] == [0, 16, 16, 32, 32]
    assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == 1
    assert uploaded_together([], torch.device("meta")) == []


def test_parts_begin_at_whole_vectors():
    assert aligned_offsets([]) == [0]
    assert aligned_offsets([1, 16, 0, 17]) == [0, 16, 32, 32, 64]


def test_an_array_of_any_strides_goes_anywhere():
    array = np.arange(12, dtype=np.int64).reshape(3, 4)[:, 1:3]
    assert uploaded(array, torch.device("cpu")).tolist() == array.tolist()
    assert uploaded(array, torch.device("meta")).stride() == (2, 1)
