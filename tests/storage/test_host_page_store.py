import pytest
import torch

from pagedkv import KVCacheSpec, KVPool, MLACacheSpec, MLAPool, TierError
from pagedkv.storage import HybridKVPool, make_layer_groups
from pagedkv.storage.host import HostPageStore
from pagedkv.testing.bits import same_bits


def make_pool(kind="kv", order="layer_first", dtype=torch.bfloat16):
    if kind == "mla":
        return MLAPool(MLACacheSpec(num_layers=2, latent_dim=8, rope_dim=4, page_size=4, order=order, dtype=dtype), 6)
    return KVPool(KVCacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, order=order, dtype=dtype), 6)


def page_bytes(pool, page):
    """All bytes of one page, whatever the order of the pool."""
    if isinstance(pool, MLAPool):
        views = [pool.pages(layer) for layer in range(2)]
    else:
        views = [part for layer in range(2) for part in (pool.key_pages(layer), pool.value_pages(layer))]
        views += [part for layer in range(2) if (part := pool.key_scales(layer)) is not None]
        views += [part for layer in range(2) if (part := pool.value_scales(layer)) is not None]
    return torch.cat([view[page].contiguous().view(torch.uint8).reshape(-1) for view in views])


def fill(pool):
    pool.buffer.view(torch.uint8).random_(256)


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
@pytest.mark.parametrize(
    "kind, dtype",
    [("kv", torch.bfloat16), ("kv", torch.int8), ("kv", torch.float8_e4m3fn), ("mla", torch.float16)],
    ids=["bf16", "int8", "fp8", "mla"],
)
def test_pages_come_back_bit_for_bit_anywhere(kind, dtype, order):
    pool = make_pool(kind, order, dtype)
    fill(pool)
    store = HostPageStore(pool, 4)
    saved = {page: page_bytes(pool, page) for page in (5, 0, 3)}
    ticket = store.save(torch.tensor([5, 0, 3]))
    fill(pool)
    before = [page_bytes(pool, page) for page in range(6)]
    store.load(ticket, torch.tensor([1, -1, 2]))
    assert torch.equal(page_bytes(pool, 1), saved[5])
    assert torch.equal(page_bytes(pool, 2), saved[3])
    assert all(torch.equal(page_bytes(pool, page), before[page]) for page in (0, 3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_pages_of_all_groups_of_a_hybrid_pool_come_back_with_every_byte(dtype):
    spec = KVCacheSpec(num_layers=4, num_kv_heads=1, head_dim=5, page_size=3, dtype=dtype, order="page_first")
    pool = HybridKVPool(spec, make_layer_groups(spec, [7, 7, 7, None]), 6)
    full, sliding = pool.groups
    fill(pool)
    slots = torch.arange(full.page_size) + 5 * full.page_size
    keys, _ = pool.gather(3, slots)
    values = pool.value_pages(1)[2].clone()
    by_page = pool.buffer.view(torch.uint8).view(6, -1)
    saved = by_page[[5, 2]].clone()
    store = HostPageStore(pool, 2)
    ticket = store.save(torch.tensor([5, 2]))
    fill(pool)
    before = by_page.clone()
    store.load(ticket, torch.tensor([0, 4]))
    assert torch.equal(by_page, torch.stack([saved[0], *before[1:4], saved[1], before[5]]))
    assert same_bits(pool.gather(3, slots - 5 * full.page_size)[0], keys)
    assert same_bits(pool.value_pages(1)[4], values)
    assert (full.page_size, sliding.page_size) == (9, 3)


def test_room_is_counted_in_pages():
    store = HostPageStore(make_pool(), 3)
    first, second = store.save(torch.tensor([0, 1])), store.save(torch.tensor([2]))
    with pytest.raises(TierError, match="must have room for 1 pages, got 0 free of 3"):
        store.save(torch.tensor([3]))
    store.drop(first)
    assert store.num_free_pages == 2
    assert store.save(torch.tensor([], dtype=torch.int64)) != second


def test_a_dropped_ticket_is_refused():
    store = HostPageStore(make_pool(), 3)
    ticket = store.save(torch.tensor([0]))
    store.drop(ticket)
    for call in (lambda: store.drop(ticket), lambda: store.load(ticket, torch.tensor([0]))):
        with pytest.raises(ValueError, match="ticket must be one that was not dropped, got 1"):
            call()


@pytest.mark.parametrize(
    "pages, error, message",
    [
        (torch.tensor([0, 6]), ValueError, r"pages must be in -1..5, got 0..6"),
        (torch.tensor([0]), ValueError, r"pages must have shape \[2\] \(as saved\), got \[1\]"),
        (torch.tensor([4, 4]), ValueError, "pages must name each page once, got one twice"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, "pages must have dtype int64"),
    ],
)
def test_wrong_pages_are_refused_before_anything_is_written(pages, error, message):
    pool = make_pool()
    fill(pool)
    store = HostPageStore(pool, 3)
    ticket = store.save(torch.tensor([0, 1]))
    before = pool.buffer.clone()
    with pytest.raises(error, match=message):
        store.load(ticket, pages)
    assert torch.equal(pool.buffer.view(torch.uint8), before.view(torch.uint8))


def test_what_it_is_made_of_is_checked():
    with pytest.raises(TypeError, match="pool must be a KVPool, a HybridKVPool or an MLAPool, got int"):
        HostPageStore(3, 3)
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        HostPageStore(make_pool(), 0)
