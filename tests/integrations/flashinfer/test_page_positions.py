"""Positions, lengths and offsets from CSR page tables."""

import pytest
import torch
from page_batches import (
    INDEX_DTYPES,
    csr,
    ints,
)

from pagedkv.integrations.flashinfer.page import (
    append_paged_kv_cache,
    block_sparse_indices_to_vector_sparse_offsets,
    get_batch_indices_positions,
    get_seq_lens,
)

# get_batch_indices_positions


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("nnz", [10, 12])
def test_get_batch_indices_positions_of_the_worked_example(nnz, dtype):
    indptr, seq_lens = ints(0, 1, 3, 6, 10, dtype=dtype), ints(5, 5, 5, 5, dtype=dtype)
    batch_indices, positions = get_batch_indices_positions(indptr, seq_lens, nnz)
    assert batch_indices.dtype == positions.dtype == torch.int32
    assert batch_indices.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3] + [-1] * (nnz - 10)
    assert positions.tolist() == [4, 3, 4, 2, 3, 4, 1, 2, 3, 4] + [0] * (nnz - 10)


def test_get_batch_indices_positions_of_requests_without_new_tokens():
    batch_indices, positions = get_batch_indices_positions(ints(0, 0, 2, 2, 3, 3), ints(0, 2, 9, 4, 1), 3)
    assert batch_indices.tolist() == [1, 1, 3]
    assert positions.tolist() == [0, 1, 3]


@pytest.mark.parametrize("nnz", [0, 3])
@pytest.mark.parametrize("num_requests", [0, 2])
def test_get_batch_indices_positions_of_no_tokens(num_requests, nnz):
    indptr, seq_lens = torch.zeros(num_requests + 1, dtype=torch.int32), torch.ones(num_requests, dtype=torch.int32)
    batch_indices, positions = get_batch_indices_positions(indptr, seq_lens, nnz)
    assert batch_indices.tolist() == [-1] * nnz
    assert positions.tolist() == [0] * nnz


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
def test_get_batch_indices_positions_writes_buffers_to_their_end(given):
    buffers = [torch.full((5,), 99, dtype=torch.int32) if wanted else None for wanted in given]
    results = get_batch_indices_positions(ints(0, 1, 3), ints(4, 2), 5, *buffers)
    for buffer, result in zip(buffers, results, strict=True):
        assert buffer is None or result is buffer
    assert [result.tolist() for result in results] == [[0, 1, 1, -1, -1], [3, 0, 1, 0, 0]]


def test_get_batch_indices_positions_of_strided_indices():
    indptr, seq_lens = ints(0, 9, 1, 9, 3, 9, dtype=torch.int64)[::2], ints(4, 9, 2, 9, dtype=torch.int64)[::2]
    assert get_batch_indices_positions(indptr, seq_lens, 3)[1].tolist() == [3, 0, 1]


def test_get_batch_indices_positions_below_zero_are_refused_by_the_append():
    batch_indices, positions = get_batch_indices_positions(ints(0, 3), ints(2), 3)
    assert positions.tolist() == [-1, 0, 1]
    new = torch.ones(3, 1, 2)
    with pytest.raises(ValueError, match="positions must be in .* got -1 at entry 0"):
        append_paged_kv_cache(new, new, batch_indices, positions, torch.zeros(1, 2, 4, 1, 2), *csr([[0]], [2]))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"nnz": 2}, "nnz must be at least append_indptr.* = 3, got 2"),
        ({"nnz": -1}, "nnz must be at least 0"),
        ({"append_indptr": ints(0, 1, 3, 3)}, "append_indptr must have shape .* B = 2 .set by seq_lens.*got .4."),
        ({"append_indptr": ints(0, 4, 3)}, "append_indptr must not decrease"),
        ({"append_indptr": ints(1, 2, 3)}, "append_indptr must start with 0, got 1"),
        ({"append_indptr": torch.tensor([0.0, 1.0, 3.0])}, "append_indptr must have dtype int32 or int64, got float32"),
        ({"seq_lens": ints(1, 2**31, dtype=torch.int64)}, "seq_lens must fit int32"),
        ({"batch_indices": torch.zeros(4, dtype=torch.int32)}, "batch_indices must have shape"),
        ({"batch_indices": torch.zeros(3, dtype=torch.int64)}, "batch_indices must have dtype int32, got int64"),
        ({"positions": torch.zeros(3)}, "positions must have dtype int32, got float32"),
        ({"positions": torch.zeros(3, dtype=torch.int32, device="meta")}, "positions must be on cpu, got meta"),
    ],
)
def test_get_batch_indices_positions_refuses_before_it_writes(change, words):
    buffer = torch.full((3,), 99, dtype=torch.int32)
    call = {"append_indptr": ints(0, 1, 3), "seq_lens": ints(4, 2), "nnz": 3, "batch_indices": buffer} | change
    with pytest.raises(ValueError, match=words):
        get_batch_indices_positions(**call)
    assert buffer.tolist() == [99] * 3


# get_seq_lens


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_get_seq_lens_of_the_worked_example(dtype):
    seq_lens = get_seq_lens(ints(0, 3, 4, 6, 8, dtype=dtype), ints(13, 8, 9, 6, dtype=dtype), 16)
    assert seq_lens.tolist() == [45, 8, 25, 22]
    assert seq_lens.dtype == dtype


def test_get_seq_lens_of_requests_without_pages():
    assert get_seq_lens(ints(0, 0, 2, 2), ints(0, 5, 7), 5).tolist() == [0, 10, 0]
    assert get_seq_lens(ints(0), ints(), 5).tolist() == []


def test_get_seq_lens_takes_a_part_of_a_longer_indptr():
    assert get_seq_lens(ints(0, 3, 4, 6)[1:], ints(8, 9), 16).tolist() == [8, 25]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((ints(0, 2), ints(0), 5), "kv_last_page_len of request 0 must be in 1..5, got 0"),
        ((ints(0, 0, 2), ints(0, 6), 5), "kv_last_page_len of request 1 must be in 1..5, got 6"),
        ((ints(0, 2, 1), ints(1, 1), 5), "kv_indptr must not decrease"),
        ((ints(0, 2), ints(1, 1), 5), "kv_indptr must have shape"),
        ((ints(0, 2), ints(1), 0), "page_size must be at least 1, got 0"),
        ((ints(0, 2**20), ints(1), 2**12), "sequence lengths must fit int32"),
        ((ints(0, 2), torch.ones(1), 5), "kv_last_page_len must have dtype int32 or int64, got float32"),
    ],
)
def test_get_seq_lens_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        get_seq_lens(*arguments)


# block_sparse_indices_to_vector_sparse_offsets


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_block_sparse_offsets_of_tokens(dtype):
    indices, indptr = ints(4, 1, 6, 2, -9, dtype=dtype), ints(0, 2, 2, 4, dtype=dtype)
    kv_lens, token_indptr = ints(5, 0, 3, dtype=dtype), ints(0, 5, 5, 9, dtype=dtype)
    offsets = torch.full((10,), 77, dtype=dtype)
    result = block_sparse_indices_to_vector_sparse_offsets(indices, indptr, offsets, token_indptr, kv_lens, 100, 7, 3)
    assert result is offsets
    assert offsets.tolist() == [400, 407, 414, 100, 107, 600, 607, 614, 77, 77]


@pytest.mark.parametrize("stride", [1, 48])
def test_block_sparse_offsets_of_blocks_of_one_token(stride):
    offsets = ints(77, 77)
    arguments = ints(4, 1), ints(0, 2), offsets, ints(0, 2), ints(2), stride, 7, 1
    assert block_sparse_indices_to_vector_sparse_offsets(*arguments).tolist() == [4 * stride, stride]
    assert offsets.tolist() == [77, 77]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kv_lens": ints(7)}, "kv_lens of request 0 must be between 0 and what its entries of block_sparse_indices"),
        ({"vector_sparse_indptr": ints(0, 3)}, "kv_lens of request 0 .* of vector_sparse_offsets hold, got 4"),
        ({"vector_sparse_indptr": ints(0, 9)}, "vector_sparse_indptr must be in 0..6"),
        ({"block_sparse_indptr": ints(0, 3)}, "block_sparse_indptr must be in 0..2"),
        ({"block_sparse_indptr": ints(0, 1, 2)}, "block_sparse_indptr must have shape"),
        ({"stride_block": 2**30}, "vector_sparse_offsets must fit int32"),
        ({"stride_block": 2**30, "block_size": 1}, "block_sparse_indices must fit int32"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"vector_sparse_offsets": torch.zeros(6)}, "vector_sparse_offsets must have dtype int32 or int64"),
    ],
)
def test_block_sparse_offsets_refuses_before_it_writes(change, words):
    call = {
        "block_sparse_indices": ints(4, 1),
        "block_sparse_indptr": ints(0, 2),
        "vector_sparse_offsets": torch.zeros(6, dtype=torch.int32),
        "vector_sparse_indptr": ints(0, 6),
        "kv_lens": ints(4),
        "stride_block": 100,
        "stride_n": 7,
        "block_size": 3,
    } | change
    with pytest.raises(ValueError, match=words):
        block_sparse_indices_to_vector_sparse_offsets(**call)
    assert not call["vector_sparse_offsets"].any()
