"""packbits and segment_packbits: what numpy packs, one segment at a time."""

import numpy as np
import pytest
import torch

from pagedkv.integrations.flashinfer.quantization import packbits, segment_packbits

BITORDERS = ["big", "little"]
INDEX_DTYPES = [torch.int32, torch.int64]


@pytest.mark.parametrize("bitorder", BITORDERS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (1000,), (3, 5), (2, 0)], ids=str)
def test_packbits_is_that_of_numpy(shape, dtype, bitorder):
    x = torch.randint(0, 3, shape).to(dtype)
    packed = packbits(x, bitorder)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(x.numpy(), bitorder=bitorder).tolist()


def test_packbits_puts_the_first_entry_highest_unless_told():
    x = torch.tensor([True, False, True, True])
    assert packbits(x).tolist() == [0b10110000]
    assert packbits(x, bitorder="little").tolist() == [0b1101]


def test_packbits_takes_any_stride():
    x = torch.rand(6, 40) < 0.5
    assert torch.equal(packbits(x[:, ::3]), packbits(x[:, ::3].contiguous()))
    assert torch.equal(packbits(x.T), packbits(x.T.contiguous()))


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_segment_packbits_of_the_worked_example(dtype):
    x = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    packed, starts = segment_packbits(x, torch.tensor([0, 4, 7, 11], dtype=dtype))
    assert packed.tolist() == [0b10110000, 0b00100000, 0b11010000]
    assert starts.tolist() == [0, 1, 2, 3]
    assert (packed.dtype, starts.dtype) == (torch.uint8, torch.int32)


@pytest.mark.parametrize("bitorder", BITORDERS)
@pytest.mark.parametrize("num_bits", [[], [0], [0, 0, 3, 0], [8, 16, 1], [63, 64, 65, 0, 1000], [9] * 20], ids=str)
def test_segment_packbits_is_numpy_of_each_segment(num_bits, bitorder):
    indptr = torch.tensor([0, *np.cumsum(num_bits, dtype=int)], dtype=torch.int32)
    x = torch.rand(sum(num_bits)) < 0.5
    packed, starts = segment_packbits(x, indptr, bitorder)
    segments = [np.packbits(part.numpy(), bitorder=bitorder).tolist() for part in x.split(num_bits)] if num_bits else []
    assert packed.tolist() == [byte for segment in segments for byte in segment]
    assert starts.tolist() == [0, *np.cumsum([len(segment) for segment in segments], dtype=int)]


@pytest.mark.parametrize("pack", [packbits, lambda x, bitorder: segment_packbits(x, torch.tensor([0, 3]), bitorder)])
def test_packing_refuses_another_dtype_or_bitorder(pack):
    with pytest.raises(ValueError, match="x must have dtype bool or uint8, got float32"):
        pack(torch.zeros(3), "big")
    with pytest.raises(ValueError, match="x must have dtype bool or uint8, got int64"):
        pack(torch.zeros(3, dtype=torch.int64), "big")
    with pytest.raises(ValueError, match="bitorder must be 'big' or 'little', got 'middle'"):
        pack(torch.zeros(3, dtype=torch.bool), "middle")


@pytest.mark.parametrize(
    "indptr, words",
    [
        (torch.tensor([0, 4]), "x must have .* = 4 entries, got 3"),
        (torch.tensor([0, 2]), "x must have .* = 2 entries, got 3"),
        (torch.tensor([1, 3]), "indptr must start with 0"),
        (torch.tensor([0, 4, 3]), "indptr must start with 0 and not decrease"),
        (torch.zeros(0, dtype=torch.int32), "indptr must start with 0"),
        (torch.tensor([0.0, 3.0]), "indptr must have dtype int32 or int64, got float32"),
        (torch.tensor([[0, 3]]), "indptr must have shape"),
    ],
    ids=str,
)
def test_segment_packbits_refuses_an_indptr_that_does_not_divide_x(indptr, words):
    with pytest.raises(ValueError, match=words):
        segment_packbits(torch.zeros(3, dtype=torch.bool), indptr)


def test_segment_packbits_refuses_more_than_one_dim():
    with pytest.raises(ValueError, match="x must have shape"):
        segment_packbits(torch.zeros(3, 2, dtype=torch.bool), torch.tensor([0, 6]))
