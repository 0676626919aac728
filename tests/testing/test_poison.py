"""The poison must bite: a kernel that reads what it does not own fails because of it."""

from dataclasses import replace

import pytest
import torch

import pagedkv
from pagedkv.testing.bits import same_bits
from pagedkv.testing.poison import owned_slots, poison_unused, poisoned_memory

SPEC = pagedkv.KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_uninitialised_memory_is_nan_in_every_test(dtype):
    like = torch.zeros(3, dtype=dtype)
    for made in (
        torch.empty(3, dtype=dtype),
        like.new_empty(3),
        torch.empty_like(like),
        torch.empty_strided((3,), (2,)),
    ):
        assert made.isnan().all()
    with torch.inference_mode():
        assert torch.empty(3, dtype=dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_new_pool_is_nan(dtype):
    pool = pagedkv.KVPool(replace(SPEC, dtype=dtype), num_pages=3)
    assert pool.key_pages(0).float().isnan().all()
    assert pool.value_pages(1).float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_of_a_new_pool_are_nan(dtype):
    pool = pagedkv.KVPool(replace(SPEC, dtype=dtype), num_pages=3)
    for layer in range(2):
        assert pool.key_scales(layer).isnan().all()
        assert pool.value_scales(layer).isnan().all()


def test_poisoned_memory_restores_what_was_set():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    inside = []

    def fails():
        with poisoned_memory():
            inside.append(torch.empty(1))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert inside[0].isnan()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_owned_slots_are_those_below_each_length():
    table = pagedkv.PageTable.from_rows([[3, 1], [0], []], seq_lens=[5, 4, 0], page_size=4)
    assert owned_slots(table, 4).int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_poison_unused_fills_exactly_the_other_slots_of_a_pool(layout, order):
    spec = pagedkv.KVCacheSpec(2, 2, 8, page_size=4, dtype=torch.float32, layout=layout, order=order)
    pool = pagedkv.KVPool(spec, num_pages=4)
    pool.buffer.zero_()
    table = pagedkv.PageTable.from_rows([[3, 1]], seq_lens=[5], page_size=4)
    poison_unused(pool, table)
    for layer in range(2):
        for pages in (pool.key_pages(layer), pool.value_pages(layer)):
            in_slot_order = pages.transpose(1, 2) if layout == "HND" else pages
            unused = in_slot_order.isnan().all(dim=(2, 3))
            assert torch.equal(unused, in_slot_order.isnan().any(dim=(2, 3)))
            assert torch.equal(unused, ~owned_slots(table, 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_poison_unused_fills_codes_and_scales_of_the_other_slots(dtype, layout, order):
    spec = pagedkv.KVCacheSpec(2, 3, 8, page_size=4, dtype=dtype, layout=layout, order=order)
    pool = pagedkv.KVPool(spec, num_pages=4)
    pool.buffer.zero_()
    table = pagedkv.PageTable.from_rows([[3, 1], [2]], seq_lens=[5, 4], page_size=4)
    poison_unused(pool, table)
    unused = ~owned_slots(table, 4)
    for layer in range(2):
        for pages in (pool.key_pages(layer), pool.value_pages(layer)):
            in_slot_order = pages.transpose(1, 2) if layout == "HND" else pages
            codes = in_slot_order.view(torch.uint8)
            assert (codes[unused] == 0x7F).all()
            assert (codes[~unused] == 0).all()
            assert dtype == torch.int8 or in_slot_order[unused].float().isnan().all()
        for scales in (pool.key_scales(layer), pool.value_scales(layer)):
            if dtype == torch.float8_e5m2:
                assert scales is None
                continue
            assert torch.equal(scales.transpose(1, 2).isnan(), unused[:, :, None].expand(4, 4, 3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unused_slots_of_quantised_pages_read_back_as_nan(dtype):
    pool = pagedkv.KVPool(replace(SPEC, dtype=dtype), num_pages=2)
    table = pagedkv.PageTable.from_rows([[1]], seq_lens=[3], page_size=4)
    pool.store(0, torch.ones(3, 2, 8), torch.ones(3, 2, 8), torch.tensor([4, 5, 6]))
    poison_unused(pool, table)
    for states in pool.gather(0, torch.arange(8)):
        assert states[[0, 1, 2, 3, 7]].isnan().all()
        assert states[4:7].isfinite().all()


def test_poison_unused_refuses_a_table_of_other_pages():
    table = pagedkv.PageTable.from_rows([[7]], seq_lens=[3], page_size=4)
    with pytest.raises(ValueError, match=r"table must name pages below 4 \(N\), got 7\."):
        poison_unused(torch.zeros(4, 4, 1, 8), table)
    with pytest.raises(ValueError, match="pages must have the page size of the table, 4, got 8"):
        poison_unused(torch.zeros(9, 8, 1, 8), table)


def mean_key_of_whole_pages(pages, table):
    """A kernel with a defect that zeroed memory hides: it sums whole pages, then divides by the length."""
    return pages[table.indices.long()].sum(dim=(0, 1)) / int(table.seq_lens[0])


def mean_key(pages, table):
    return pages[table.indices.long()].flatten(0, 1)[: int(table.seq_lens[0])].sum(dim=0) / int(table.seq_lens[0])


def test_the_poison_bites_a_kernel_that_reads_the_tail_of_a_page():
    table = pagedkv.PageTable.from_rows([[2, 0]], seq_lens=[6], page_size=4)
    pages = torch.zeros(3, 4, 2, 8)
    keys = torch.randint(9, (6, 2, 8)).float()  # whole numbers: sums are exact in any order
    pagedkv.store_kv(keys, keys, pages, torch.empty_like(pages), table.slot_mapping(torch.tensor([0, 6]).int()))
    assert same_bits(mean_key_of_whole_pages(pages, table), mean_key(pages, table)), "zeroed memory hides the defect"
    before = mean_key(pages, table)
    poison_unused(pages, table)
    assert same_bits(mean_key(pages, table), before)
    assert mean_key_of_whole_pages(pages, table).isnan().all()
