import pytest
import torch

from pagedkv import PageTable


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_from_rows_builds_csr_and_drops_spare_pages():
    table = PageTable.from_rows([[3, 7, 9], [5], [], [1, 2]], seq_lens=[20, 4, 0, 32], page_size=16)
    assert table.indptr.tolist() == [0, 2, 3, 3, 5]
    assert table.indices.tolist() == [3, 7, 5, 1, 2]
    assert table.last_page_len.tolist() == [4, 4, 0, 16]
    assert table.seq_lens.tolist() == [20, 4, 0, 32]
    assert table.seq_lens.dtype == torch.int32
    assert (table.num_seqs, table.max_page) == (4, 7)


def test_dense_form_and_back():
    table = PageTable.from_rows([[3, 7], [5], []], seq_lens=[17, 16, 0], page_size=16)
    dense = table.to_dense()
    assert dense.tolist() == [[3, 7], [5, -1], [-1, -1]]
    again = PageTable.from_dense(dense, table.seq_lens, page_size=16)
    for name in ("indptr", "indices", "last_page_len"):
        assert torch.equal(getattr(again, name), getattr(table, name))


def test_empty_batch():
    table = PageTable.from_rows([], seq_lens=[], page_size=4)
    assert (table.num_seqs, table.max_page, table.to_dense().shape) == (0, -1, (0, 0))
    assert table.slot_mapping(int32(0)).tolist() == []


def test_slot_mapping_names_the_last_tokens():
    table = PageTable.from_rows([[3, 7], [5], []], seq_lens=[20, 4, 0], page_size=16)
    slots = table.slot_mapping(int32(0, 6, 7, 7))
    assert slots.tolist() == [62, 63, 112, 113, 114, 115, 83]
    assert slots.dtype == torch.int64


def test_slot_mapping_is_computed_in_64_bits():
    page = 2**31 - 1
    table = PageTable.from_rows([[page]], seq_lens=[16], page_size=16)
    assert table.slot_mapping(int32(0, 1)).tolist() == [page * 16 + 15]


def test_spare_indices_are_ignored_even_when_negative():
    table = PageTable(int32(0, 1), int32(2, -1, -1), int32(3), page_size=4)
    assert table.max_page == 2


@pytest.mark.parametrize(
    "indptr, indices, last, words",
    [
        ([1, 2], [0, 0], [1], "indptr must start with 0, got 1"),
        ([0, 2, 1], [0, 0], [1, 1], "indptr must not decrease, got 2 then 1 at entry 2"),
        ([0, 3], [0, 0], [1], r"indices must hold indptr\[-1\] = 3 entries, got 2"),
        ([0, 1], [-1], [1], "indices must hold page ids of 0 or more, got -1 at entry 0"),
        ([0, 1], [0], [0], r"last_page_len of sequence 0 must be in 1..4 \(page_size\), got 0"),
        ([0, 1], [0], [5], r"last_page_len of sequence 0 must be in 1..4 \(page_size\), got 5"),
        ([0, 1, 1], [0], [4, 1], r"last_page_len of sequence 1 must be 0 \(it has no pages\), got 1"),
        ([0], [0], [1], r"indptr must have shape \[S \+ 1\] with S = 1 \(set by last_page_len\), got \[1\]"),
    ],
)
def test_constructor_refuses(indptr, indices, last, words):
    with pytest.raises(ValueError, match=words):
        PageTable(int32(*indptr), int32(*indices), int32(*last), page_size=4)


@pytest.mark.parametrize("position", range(3))
def test_constructor_never_casts_an_index(position):
    tensors = [int32(0, 1), int32(0), int32(1)]
    tensors[position] = tensors[position].long()
    with pytest.raises(TypeError, match=r"must have dtype int32, got int64\. Build it with PageTable.from_rows"):
        PageTable(*tensors, page_size=4)


def test_from_rows_refuses_rows_too_short_for_their_length():
    with pytest.raises(ValueError, match=r"row 1 must have 2 pages for 5 tokens \(page_size 4\), got 1"):
        PageTable.from_rows([[0], [1]], seq_lens=[4, 5], page_size=4)
    with pytest.raises(ValueError, match="seq_lens must have one entry a row, got 1 for 2 rows"):
        PageTable.from_rows([[0], [1]], seq_lens=[4], page_size=4)
    with pytest.raises(ValueError, match="seq_lens must be 0 or more, got -1 for row 0"):
        PageTable.from_rows([[0]], seq_lens=[-1], page_size=4)


def test_from_dense_refuses_too_few_columns_and_unused_entries_in_use():
    with pytest.raises(ValueError, match="dense must have 2 columns for the 5 tokens of row 0, got 1"):
        PageTable.from_dense(torch.zeros(1, 1, dtype=torch.int32), int32(5), page_size=4)
    with pytest.raises(ValueError, match="page ids of 0 or more, got -1"):
        PageTable.from_dense(int32(-1)[None], int32(1), page_size=4)
    with pytest.raises(TypeError, match="dense must have dtype int32, got int64"):
        PageTable.from_dense(torch.zeros(1, 1, dtype=torch.int64), int32(1), page_size=4)


def test_slot_mapping_refuses_more_new_tokens_than_there_are():
    table = PageTable.from_rows([[3], [5]], seq_lens=[4, 2], page_size=4)
    with pytest.raises(ValueError, match=r"sequence 1 between 0 and 2 \(its length\) new tokens, got 3"):
        table.slot_mapping(int32(0, 4, 7))
    with pytest.raises(ValueError, match=r"query_indptr must have shape \[S \+ 1\] with S = 2"):
        table.slot_mapping(int32(0, 4))
    with pytest.raises(TypeError, match="query_indptr must have dtype int32, got int64"):
        table.slot_mapping(torch.tensor([0, 1, 2]))


def test_differences_that_wrap_around_in_32_bits_are_refused():
    with pytest.raises(ValueError, match="indptr must not decrease, got 2147483647 then -2"):
        PageTable(int32(0, 2**31 - 1, -2, 4), int32(0, 1, 2, 3), int32(1, 1, 1), page_size=1)


def test_table_keeps_what_was_checked():
    indptr, indices, last = int32(0, 1), int32(2), int32(3)
    table = PageTable(indptr, indices, last, page_size=4)
    for tensor in (indptr, indices, last, table.seq_lens):
        tensor.fill_(99)
    assert (table.indptr.tolist(), table.indices.tolist(), table.seq_lens.tolist()) == ([0, 1], [2], [3])


@pytest.mark.parametrize("query_indptr", [(2, 3, 5), (0, 2**31 - 1, -2)])
def test_slot_mapping_refuses_what_divides_no_tokens(query_indptr):
    table = PageTable.from_rows([[3], [5]], seq_lens=[4, 4], page_size=4)
    with pytest.raises(ValueError, match="query_indptr must start with 0 and not decrease"):
        table.slot_mapping(int32(*query_indptr))


def test_from_rows_never_casts_an_id():
    with pytest.raises(TypeError, match="float"):
        PageTable.from_rows([[1.7]], seq_lens=[1], page_size=4)
    with pytest.raises(ValueError, match=r"row 0 must hold page ids below 2\*\*31, got 1099511627776"):
        PageTable.from_rows([[2**40]], seq_lens=[1], page_size=4)
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        PageTable.from_dense(int32(1)[None], int32(1), page_size=0)
    with pytest.raises(ValueError, match=r"page_size must be below 2\*\*31, got 2147483648"):
        PageTable.from_rows([[2**31 - 1]], seq_lens=[2**31], page_size=2**31)


def test_slots_of_the_largest_pages_fit_in_64_bits():
    table = PageTable.from_rows([[2**31 - 1]], seq_lens=[2**31 - 1], page_size=2**31 - 1)
    assert table.slot_mapping(int32(0, 1)).tolist() == [2**31 * (2**31 - 1) - 1]


# Tensors on the device "meta" have shapes and no contents: what reads one back fails.


def test_a_table_on_another_device_keeps_what_the_host_knows():
    here = PageTable.from_rows([[3, 7], [5], []], seq_lens=[6, 4, 0], page_size=4)
    there = PageTable.from_rows([[3, 7], [5], []], seq_lens=[6, 4, 0], page_size=4, device="meta")
    assert there.indptr.device == there.indices.device == there.seq_lens.device == torch.device("meta")
    assert [array.tolist() for array in there.host] == [[0, 2, 3, 3], [3, 7, 5], [6, 4, 0]]
    assert (there.max_page, there.max_seq_len, there.num_seqs, repr(there)) == (7, 6, 3, repr(here))
    assert there.last_page_len.shape == (3,)
    assert there.to_dense().shape == (3, 2)
    back = there.to("cpu")
    assert torch.equal(back.indices, here.indices)
    assert torch.equal(back.last_page_len, here.last_page_len)
    assert here.to("cpu") is here


def test_new_tokens_may_be_divided_on_the_cpu_for_a_table_elsewhere():
    table = PageTable.from_rows([[3, 7], [5]], seq_lens=[6, 4], page_size=4, device="meta")
    slots = table.slot_mapping(int32(0, 2, 3))
    assert (slots.device.type, slots.shape, slots.dtype) == ("meta", (3,), torch.int64)
    with pytest.raises(ValueError, match="query_indptr must be on meta like the page table, got cpu"):
        table.check_query_indptr(int32(0, 2, 3))


def test_a_division_that_the_table_knows_is_not_read_back():
    table = PageTable.from_rows([[3, 7], [5]], seq_lens=[6, 4], page_size=4, device="meta")
    known = torch.empty(3, dtype=torch.int32, device="meta")
    table.know_query_indptr(known, int32(0, 2, 3).numpy())
    assert table.check_query_indptr(known) == 3
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        table.check_query_indptr(torch.empty(3, dtype=torch.int32, device="meta"))
