"""The page functions by dense page tables, and the signatures, which are those of the CSR form."""

import inspect

import pytest
import torch
from page_batches import (
    CACHE_FORMS,
    DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    ints,
    make_cache,
)

from pagedkv.integrations.flashinfer.page import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from pagedkv.testing.bits import same_bits

# The dense form


DENSE_TABLE = ints(3, 7, -1, 5, -1, -1, 1, 2, 4).view(3, 3)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_dense_lengths_and_positions(index_dtype):
    table = torch.cat([DENSE_TABLE, torch.full((1, 3), -1)]).to(index_dtype)
    last = ints(2, 0, 4, 3, dtype=index_dtype)
    for seq_lens in (get_seq_lens(table, last, 5), get_seq_lens(page_table=table, last_page_len=last, page_size=5)):
        assert seq_lens.tolist() == [7, 0, 14, 0]
        assert seq_lens.dtype == index_dtype
    for batch_indices, positions in (
        get_batch_indices_positions(table, last, 5),
        get_batch_indices_positions(table, last_page_len=last, page_size=5),
    ):
        assert batch_indices.dtype == positions.dtype == torch.int32
        assert batch_indices.tolist() == [0, 1, 2, 3]
        assert positions.tolist() == [7, 0, 14, 0]


def test_dense_length_of_a_full_last_page():
    assert get_seq_lens(ints(3, 7).view(1, 2), ints(5), 5).tolist() == [10]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("form", CACHE_FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_dense_append_writes_one_token_a_request(index_dtype, dtype, layout, form, by_name):
    heads, dim = 2, 6
    value_dim = dim if form in ("combined", "page_slices") else 3
    cache, pages = make_cache(form, layout, 5, heads, dim, value_dim, dtype)
    new = torch.randn(3, heads, dim).to(dtype), torch.randn(3, heads, value_dim).to(dtype)
    expected = [view.clone() for view in pages]
    for request, at in enumerate([(7, 2), (5, 0), (4, 4)]):
        expected[0][at], expected[1][at] = new[0][request], new[1][request]
    table, last = DENSE_TABLE.to(index_dtype), ints(2, 0, 4, dtype=index_dtype)
    if by_name:
        named = {"page_table": table, "last_page_len": last, "page_size": 5}
        append_paged_kv_cache(new_k=new[0], new_v=new[1], kv_cache=cache, **named, kv_layout=layout)
    else:
        assert append_paged_kv_cache(*new, cache, table, last, 5, kv_layout=layout) is None
    for view, wanted in zip(pages, expected, strict=True):
        assert same_bits(view, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_name", [False, True])
def test_dense_append_mla_puts_the_key_before_the_value(by_name, dtype):
    cache = torch.full((8, 5, 2, 12), float("nan")).to(dtype)
    expected = cache.clone()
    new_k, new_v = torch.randn(2, 3, 2, 6).to(dtype)
    for request, at in enumerate([(7, 2), (5, 0), (4, 4)]):
        expected[at] = torch.cat([new_k[request], new_v[request]], -1)
    if by_name:
        table = {"page_table": DENSE_TABLE, "last_page_len": ints(2, 0, 4), "page_size": 5}
        append_paged_mla_kv_cache(new_k, new_v, mla_kv_cache=cache, **table)
    else:
        assert append_paged_mla_kv_cache(new_k, new_v, cache, DENSE_TABLE, ints(2, 0, 4), 5) is None
    assert same_bits(cache, expected)


@pytest.mark.parametrize("width", [0, 3])
def test_dense_form_of_no_requests(width):
    table, last, new = torch.zeros(0, width, dtype=torch.int32), ints(), torch.zeros(0, 1, 2)
    append_paged_kv_cache(new, new, torch.zeros(2, 2, 5, 1, 2), table, last, 5)
    append_paged_mla_kv_cache(new, new, torch.zeros(2, 5, 1, 4), table, last, 5)
    assert get_seq_lens(table, last, 5).tolist() == []
    assert [result.tolist() for result in get_batch_indices_positions(table, last, 5)] == [[], []]


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"last_page_len": ints(2, 0, 5)}, "last_page_len of request 2 must be in 0..4 .its last page must have room"),
        ({"last_page_len": ints(2, 0, 6)}, "last_page_len of request 2 must be in 0..5, got 6"),
        ({"last_page_len": ints(2, -1, 4)}, "last_page_len of request 1 must be in 0..5, got -1"),
        ({"last_page_len": ints(2, 0)}, "last_page_len must have shape"),
        ({"page_table": torch.full((3, 3), -1)}, "page_table of request 0 must be a row with at least one page"),
        ({"page_table": ints(1, -1, 2).expand(3, 3)}, "page_table of request 0 must have no page after an entry below"),
        ({"page_table": ints(1, 2, 8).expand(3, 3)}, "page_table must be in .0, 8."),
        ({"page_table": DENSE_TABLE[:2]}, "page_table must have shape .*B = 3"),
        ({"page_table": DENSE_TABLE.double()}, "page_table must have dtype int32 or int64, got float64"),
        ({"page_size": 4}, "page_size must be 5"),
        ({"new_k": torch.ones(3, 2, 6).half()}, "new_k must have dtype float32 like"),
        ({"new_v": torch.ones(3, 2, 5)}, "must have shape"),
    ],
)
def test_dense_append_refuses_before_it_writes(change, words, mla):
    cache = torch.zeros(8, 5, 2, 12) if mla else torch.zeros(8, 2, 5, 2, 6)
    new = torch.ones(3, 2, 6)
    table = {"page_table": DENSE_TABLE, "last_page_len": ints(2, 0, 4), "page_size": 5}
    call = {"new_k": new, "new_v": new, "mla_kv_cache" if mla else "kv_cache": cache, **table} | change
    with pytest.raises(ValueError, match=words):
        (append_paged_mla_kv_cache if mla else append_paged_kv_cache)(**call)
    assert not cache.any()


def test_signatures_are_those_of_the_csr_form():
    assert list(inspect.signature(append_paged_kv_cache).parameters) == [
        *("append_key", "append_value", "batch_indices", "positions", "paged_kv_cache"),
        *("kv_indices", "kv_indptr", "kv_last_page_len", "kv_layout"),
    ]
    assert inspect.signature(append_paged_kv_cache).parameters["kv_layout"].default == "NHD"
    assert list(inspect.signature(append_paged_mla_kv_cache).parameters) == [
        *("append_ckv", "append_kpe", "batch_indices", "positions", "ckv_cache", "kpe_cache"),
        *("kv_indices", "kv_indptr", "kv_last_page_len"),
    ]
    assert list(inspect.signature(get_seq_lens).parameters) == ["kv_indptr", "kv_last_page_len", "page_size"]
    names = ["append_indptr", "seq_lens", "nnz", "batch_indices", "positions"]
    assert list(inspect.signature(get_batch_indices_positions).parameters) == names
