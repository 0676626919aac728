import copy
import itertools
import pickle

import pytest
import torch

import pagedkv
from pagedkv import KVCacheSpec, KVPool
from pagedkv.testing.bits import same_bits

ORDERS_AND_LAYOUTS = list(itertools.product(("layer_first", "page_first"), ("NHD", "HND")))


SCALED = [torch.int8, torch.float8_e4m3fn]


def make_pool(order="layer_first", layout="NHD", num_pages=5, **fields):
    fields = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "page_size": 4, "dtype": torch.float32, **fields}
    return KVPool(KVCacheSpec(**fields, order=order, layout=layout), num_pages)


def test_layer_first_is_one_tensor_of_the_documented_shape():
    pool = make_pool()
    whole = pool.buffer.view(2, 3, 5, 4, 2, 8)
    whole.copy_(torch.arange(whole.numel()).view_as(whole))
    for layer in range(3):
        assert torch.equal(pool.key_pages(layer), whole[0, layer])
        assert torch.equal(pool.value_pages(layer), whole[1, layer])


def test_page_first_keeps_one_page_of_all_layers_together():
    pool = make_pool("page_first", "HND")
    whole = pool.buffer.view(5, 3, 2, 2, 4, 8)
    whole.copy_(torch.arange(whole.numel()).view_as(whole))
    for layer in range(3):
        assert torch.equal(pool.key_pages(layer), whole[:, layer, 0])
        assert torch.equal(pool.value_pages(layer), whole[:, layer, 1])


@pytest.mark.parametrize("order, layout", ORDERS_AND_LAYOUTS)
@pytest.mark.parametrize("fields", [{}, {"value_dim": 4}, {"num_kv_heads": (1, 0, 3), "head_dim": (8, 8, 2)}])
def test_views_tile_the_buffer(order, layout, fields):
    pool = make_pool(order, layout, **fields)
    pool.buffer.zero_()
    for layer in range(3):
        for pages in (pool.key_pages(layer), pool.value_pages(layer)):
            assert pages.untyped_storage().data_ptr() == pool.buffer.untyped_storage().data_ptr()
            pages.add_(1)
    assert torch.equal(pool.buffer, torch.ones_like(pool.buffer))
    assert pool.num_bytes == pool.spec.bytes_per_page * pool.num_pages


@pytest.mark.parametrize("order, layout", ORDERS_AND_LAYOUTS)
@pytest.mark.parametrize("fields", [{}, {"value_dim": 4}, {"num_kv_heads": (1, 2, 3)}])
def test_store_gather_copy_are_bitwise_in_every_order(order, layout, fields):
    pool = make_pool(order, layout, **fields)
    pool.buffer.zero_()
    slots = torch.tensor([17, 2, 3, 16])
    written = []
    for layer, geometry in enumerate(pool.spec.layers):
        key = torch.randn(4, geometry.num_kv_heads, geometry.head_dim)
        value = torch.randn(4, geometry.num_kv_heads, geometry.value_dim)
        pool.store(layer, key, value, slots)
        written.append((key, value))
    pool.copy_pages(torch.tensor([4, 0]), torch.tensor([2, 1]))
    moved = torch.tensor([9, 6, 7, 8])
    for layer, (key, value) in enumerate(written):
        for where in (slots, moved):
            got_key, got_value = pool.gather(layer, where)
            assert torch.equal(got_key, key)
            assert torch.equal(got_value, value)


def test_a_pool_with_scales_keeps_them_before_its_pages():
    pool = make_pool(dtype=torch.int8)
    scales = pool.buffer[: 2 * 3 * 5 * 2 * 4 * 4].view(torch.float32).view(2, 3, 5, 2, 4)
    pages = pool.buffer[scales.numel() * 4 :].view(torch.int8).view(2, 3, 5, 4, 2, 8)
    scales.copy_(torch.arange(scales.numel()).view_as(scales))
    pages.copy_(torch.randint(-128, 128, pages.shape))
    for layer in range(3):
        assert torch.equal(pool.key_scales(layer), scales[0, layer])
        assert torch.equal(pool.value_scales(layer), scales[1, layer])
        assert torch.equal(pool.key_pages(layer), pages[0, layer])
        assert torch.equal(pool.value_pages(layer), pages[1, layer])


def test_page_first_keeps_the_scales_of_a_page_with_it():
    pool = make_pool("page_first", "HND", dtype=torch.float8_e4m3fn)
    by_page = pool.buffer.view(5, -1)
    by_page.copy_(torch.arange(5)[:, None].expand_as(by_page))
    for layer in range(3):
        for pages in (pool.key_pages(layer), pool.value_pages(layer)):
            assert torch.equal(pages.view(torch.uint8), torch.arange(5)[:, None, None, None].expand_as(pages))
        for scales in (pool.key_scales(layer), pool.value_scales(layer)):
            # Scales are read through their four bytes, all of them the number of the page.
            assert (scales.contiguous().view(torch.uint8) == torch.arange(5)[:, None, None]).all()


@pytest.mark.parametrize("order, layout", ORDERS_AND_LAYOUTS)
@pytest.mark.parametrize("fields", [{}, {"value_dim": 4}, {"num_kv_heads": (1, 0, 3), "head_dim": (8, 8, 2)}])
def test_views_of_pages_and_scales_tile_the_buffer(order, layout, fields):
    pool = make_pool(order, layout, dtype=torch.int8, **fields)
    pool.buffer.zero_()
    num_bytes = 0
    for layer in range(3):
        for pages in (pool.key_pages(layer), pool.value_pages(layer)):
            pages.sub_(1)
            num_bytes += pages.numel()
        for scales in (pool.key_scales(layer), pool.value_scales(layer)):
            assert int(scales.view(torch.int32).count_nonzero()) == 0, "bytes that another view wrote"
            scales.view(torch.int32).sub_(1)
            num_bytes += 4 * scales.numel()
    assert bool((pool.buffer == 255).all())
    assert num_bytes == pool.num_bytes == pool.spec.bytes_per_page * pool.num_pages


@pytest.mark.parametrize("order, layout", ORDERS_AND_LAYOUTS)
@pytest.mark.parametrize("fields", [{}, {"value_dim": 4}, {"num_kv_heads": (1, 2, 3)}, {"head_dim": 3, "page_size": 1}])
@pytest.mark.parametrize("dtype", SCALED, ids=str)
def test_a_pool_with_scales_quantizes_gathers_numbers_and_copies_both(dtype, order, layout, fields):
    pool = make_pool(order, layout, num_pages=21, dtype=dtype, **fields)
    page_size = pool.page_size
    slots = torch.tensor([4, 2, 0, 3]) * page_size + page_size - 1
    written = []
    for layer, geometry in enumerate(pool.spec.layers):
        key = torch.randn(4, geometry.num_kv_heads, geometry.head_dim).bfloat16()
        value = torch.randn(4, geometry.num_kv_heads, geometry.value_dim)
        pool.store(layer, key, value, slots)
        written.append([pagedkv.dequantize_kv(*pagedkv.quantize_kv(x, dtype)) for x in (key, value)])
    pool.copy_pages(torch.tensor([4, 2, 0, 3]), torch.tensor([20, 6, 8, 10]))
    moved = torch.tensor([20, 6, 8, 10]) * page_size + page_size - 1
    for layer, expected in enumerate(written):
        for where in (slots, moved):
            for got, numbers in zip(pool.gather(layer, where), expected, strict=True):
                assert same_bits(got, numbers)
        for got in pool.gather(layer, torch.tensor([-1, int(moved[0])])):
            assert int(got[0].count_nonzero()) == 0


def test_a_pool_without_scales_says_so_and_moves_codes():
    assert make_pool().key_scales(0) is None
    pool = make_pool(dtype=torch.float8_e5m2)
    assert pool.value_scales(2) is None
    key = torch.randn(1, 2, 8).to(torch.float8_e5m2)
    pool.store(0, key, key, torch.tensor([7]))
    for got in pool.gather(0, torch.tensor([7])):
        assert same_bits(got, key)
    with pytest.raises(TypeError, match=r"key must have dtype float8_e5m2, got float32\.$"):
        pool.store(0, key.float(), key.float(), torch.tensor([7]))


def test_pool_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        pool = make_pool()
    pool.store(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([0]))
    assert not pool.buffer.is_inference()


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_out_of_range_are_refused(layer):
    with pytest.raises(ValueError, match=rf"layer must be in 0..2, got {layer}"):
        make_pool().key_pages(layer)


def test_pool_refuses_what_is_no_spec_or_no_page_count():
    with pytest.raises(TypeError, match="spec must be a KVCacheSpec, got dict"):
        KVPool({}, 4)
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        make_pool(num_pages=0)
    with pytest.raises(TypeError, match="layer must be an int, got str"):
        make_pool().key_pages("0")


def test_copy_pages_refuses_before_any_layer_is_written():
    pool = make_pool(num_kv_heads=(1, 2, 3))
    pool.buffer.copy_(torch.randn_like(pool.buffer))
    before = pool.buffer.clone()
    with pytest.raises(ValueError, match=r"dst must be in \[0, 5\)"):
        pool.copy_pages(torch.tensor([0, 1]), torch.tensor([2, 5]))
    assert torch.equal(pool.buffer, before)


@pytest.mark.parametrize("copied", [lambda pool: pickle.loads(pickle.dumps(pool)), copy.deepcopy])
def test_a_copied_pool_has_views_of_its_own_buffer(copied):
    pool = make_pool()
    pool.buffer.zero_()
    twin = copied(pool)
    twin.store(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([0]))
    assert (twin.buffer.sum(), pool.buffer.sum()) == (32, 0)


@pytest.mark.parametrize("copied", [lambda pool: pickle.loads(pickle.dumps(pool)), copy.deepcopy])
def test_a_copied_pool_has_scales_of_its_own_buffer(copied):
    pool = make_pool("page_first", dtype=torch.int8)
    pool.buffer.zero_()
    twin = copied(pool)
    twin.store(0, torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([0]))
    assert torch.equal(twin.gather(0, torch.tensor([0]))[0], torch.ones(1, 2, 8))
    assert twin.key_scales(0).untyped_storage().data_ptr() == twin.buffer.untyped_storage().data_ptr()
    assert int(pool.buffer.count_nonzero()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_pickled_pool_of_any_dtype_comes_back(dtype):
    pool = KVPool(KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype=dtype), num_pages=3)
    pool.buffer.view(torch.uint8).random_(0, 255)
    loaded = pickle.loads(pickle.dumps(pool))
    assert loaded.buffer.dtype == pool.buffer.dtype
    for layer in range(2):
        pages = (loaded.key_pages(layer), pool.key_pages(layer)), (loaded.value_pages(layer), pool.value_pages(layer))
        assert all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pages)
