import copy
import pickle

import pytest
import torch

from pagedkv import KVCacheManager, KVCacheSpec, MLACacheSpec, MLAPool, mla_attention, plan_attention
from pagedkv.testing.bits import same_bits
from pagedkv.testing.mla_numeric import assert_mla_close

ORDERS = ("layer_first", "page_first")


def make_pool(order="layer_first", num_pages=5, **fields):
    fields = {"num_layers": 3, "latent_dim": 8, "rope_dim": 4, "page_size": 4, "dtype": torch.float32, **fields}
    return MLAPool(MLACacheSpec(**fields, order=order), num_pages)


@pytest.mark.parametrize("order, shape", [("layer_first", (3, 5, 4, 12)), ("page_first", (5, 3, 4, 12))])
def test_a_pool_is_one_tensor_of_the_documented_shape(order, shape):
    pool = make_pool(order)
    whole = pool.buffer.view(shape)
    whole.copy_(torch.arange(whole.numel()).view_as(whole))
    for layer in range(3):
        of_layer = whole[layer] if order == "layer_first" else whole[:, layer]
        assert torch.equal(pool.pages(layer), of_layer)
        assert torch.equal(pool.latent_pages(layer), of_layer[..., :8])
        assert torch.equal(pool.rope_pages(layer), of_layer[..., 8:])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rope_dim", [0, 4])
def test_views_tile_the_buffer(order, rope_dim):
    pool = make_pool(order, rope_dim=rope_dim)
    pool.buffer.zero_()
    for layer in range(3):
        assert pool.rope_pages(layer).shape == (5, 4, rope_dim)
        for pages in (pool.latent_pages(layer), pool.rope_pages(layer)):
            assert pages.untyped_storage().data_ptr() == pool.buffer.untyped_storage().data_ptr()
            pages.add_(1)
    assert torch.equal(pool.buffer, torch.ones_like(pool.buffer))
    assert pool.num_bytes == pool.spec.bytes_per_page * pool.num_pages


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("latent_dim, rope_dim", [(8, 4), (7, 3), (512, 64), (8, 0)])
def test_store_gather_copy_are_bitwise_in_every_order(order, dtype, latent_dim, rope_dim):
    pool = make_pool(order, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype)
    slots = torch.tensor([17, 2, 3, 16])
    written = [(torch.randn(4, latent_dim).to(dtype), torch.randn(4, rope_dim).to(dtype)) for _ in range(3)]
    for layer, tokens in enumerate(written):
        pool.store(layer, *tokens, slots)
    pool.copy_pages(torch.tensor([4, 0]), torch.tensor([2, 1]))
    for layer, tokens in enumerate(written):
        for where in (slots, torch.tensor([9, 6, 7, 8])):
            for got, token in zip(pool.gather(layer, where), tokens, strict=True):
                assert same_bits(got, token)
                assert got.is_contiguous()
    assert int((~pool.pages(0).isnan()).any(2).sum()) == 8, "other slots stay as they were"


def test_negative_slots_store_nothing_and_gather_zeros():
    pool = make_pool()
    pool.store(1, torch.ones(2, 8), torch.ones(2, 4), torch.tensor([-1, 6]))
    latent, rope = pool.gather(1, torch.tensor([6, -3]))
    assert (latent.sum(1).tolist(), rope.sum(1).tolist()) == ([8, 0], [4, 0])
    assert int((~pool.buffer.isnan()).sum()) == 12


def test_a_pool_without_rope_keys_takes_none():
    pool = make_pool(rope_dim=0)
    pool.store(0, torch.ones(1, 8), None, torch.tensor([2]))
    latent, rope = pool.gather(0, torch.tensor([2]))
    assert torch.equal(latent, torch.ones(1, 8))
    assert rope.shape == (1, 0)


def test_store_refuses_before_anything_is_written():
    pool = make_pool()
    with pytest.raises(ValueError, match=r"slot_mapping must be below 20 \(N \* P slots\), got 20 at entry 1"):
        pool.store(0, torch.ones(2, 8), torch.ones(2, 4), torch.tensor([0, 20]))
    with pytest.raises(ValueError, match="rope must be given for rope_pages with R = 4, got None"):
        pool.store(0, torch.ones(2, 8), None, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"slots must be below 20"):
        pool.gather(0, torch.tensor([20]))
    with pytest.raises(ValueError, match=r"dst must be in \[0, 5\)"):
        pool.copy_pages(torch.tensor([0, 1]), torch.tensor([2, 5]))
    assert pool.buffer.isnan().all()


def test_pool_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        pool = make_pool()
    pool.store(0, torch.ones(1, 8), torch.ones(1, 4), torch.tensor([0]))
    assert not pool.buffer.is_inference()


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_out_of_range_are_refused(layer):
    for view in (make_pool().pages, make_pool().latent_pages, make_pool().rope_pages):
        with pytest.raises(ValueError, match=rf"layer must be in 0..2, got {layer}"):
            view(layer)


def test_pool_refuses_what_is_no_spec_or_no_page_count():
    with pytest.raises(TypeError, match="spec must be an MLACacheSpec, got KVCacheSpec"):
        MLAPool(KVCacheSpec(1, 1, 8), 4)
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        make_pool(num_pages=0)
    with pytest.raises(TypeError, match="layer must be an int, got str"):
        make_pool().latent_pages("0")


@pytest.mark.parametrize("copied", [lambda pool: pickle.loads(pickle.dumps(pool)), copy.deepcopy])
def test_a_copied_pool_has_views_of_its_own_buffer(copied):
    pool = make_pool()
    pool.buffer.zero_()
    twin = copied(pool)
    twin.store(0, torch.ones(1, 8), torch.ones(1, 4), torch.tensor([0]))
    assert (twin.buffer.sum(), pool.buffer.sum()) == (12, 0)


def test_repr_says_what_it_is():
    assert repr(make_pool()).startswith("MLAPool(num_pages=5, device='cpu', 0.0 MiB, MLACacheSpec(num_layers=3")


@pytest.mark.parametrize("order", ORDERS)
def test_a_manager_runs_an_mla_pool(order):
    """Prefix hit, fork, copy on write and attention, over latents: the manager asks no more of a pool than pages."""
    pool = make_pool(order, num_pages=8)
    manager = KVCacheManager(pool, debug=True)
    latent, rope = torch.randn(9, 8), torch.randn(9, 4)
    prompt = list(range(9))

    first = manager.open(prompt)
    slots = first.append(9)
    for layer in range(3):
        pool.store(layer, latent, rope, slots)
    first.commit(prompt)
    second = manager.open(prompt[:8])
    assert second.num_cached_tokens == 8

    child = first.fork()
    new = child.append(1)
    assert manager.stats().copied_pages == 1
    for layer in range(3):
        pool.store(layer, torch.ones(1, 8), torch.ones(1, 4), new)

    table = manager.page_table([first, second, child])
    assert table.seq_lens.tolist() == [9, 8, 10]
    for layer in range(3):
        read, _ = pool.gather(layer, table.slot_mapping(torch.tensor([0, 9, 17, 27], dtype=torch.int32)))
        assert same_bits(read, torch.cat([latent, latent[:8], latent, torch.ones(1, 8)]))

    one_each = torch.arange(4, dtype=torch.int32)
    plan = plan_attention(one_each, table, num_q_heads=3, num_kv_heads=1, head_dim=12, value_dim=8)
    query = torch.randn(3, 3, 8), torch.randn(3, 3, 4)
    pages = pool.latent_pages(1), pool.rope_pages(1)
    state = mla_attention(*query, *pages, plan, sm_scale=0.3, return_lse=True)
    assert_mla_close(state, *query, *pages, plan, sm_scale=0.3)
    for seq in (first, second, child):
        seq.close()
    assert manager.num_free_pages + manager.num_evictable_pages == 8
