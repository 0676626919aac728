"""Pools, managers and host memory on the device do what they do on the CPU."""

from __future__ import annotations

import pytest
import torch

from pagedkv import (
    HostPageStore,
    KVCacheManager,
    KVCacheSpec,
    KVPool,
    MLACacheSpec,
    MLAPool,
    check_integrity,
    paged_attention,
    plan_attention,
)
from pagedkv.kernels import AttentionState
from pagedkv.testing.bits import same_bits
from pagedkv.testing.numeric import assert_attention_close

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def make_pool(device, dtype=torch.bfloat16, order="layer_first", num_pages=40):
    spec = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=16, page_size=4, dtype=dtype, order=order)
    return KVPool(spec, num_pages, device)


class Steps:
    """The same calls of a manager and its pool, whatever their device."""

    def __init__(self, device, order):
        self.device = device
        self.pool = make_pool(device, order=order)
        self.tier = HostPageStore(self.pool, 30)
        self.manager = KVCacheManager(self.pool, tier=self.tier, prefix_cache=False)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, seqs, num_tokens):
        """Reserves, stores random tokens in all layers and gives the attention of the last layer on the CPU."""
        batch = self.manager.batch(seqs, num_tokens)
        for layer in range(2):
            key, value = (torch.randn(batch.num_tokens, 2, 16, generator=self.generator).bfloat16() for _ in "kv")
            self.pool.store(layer, key.to(self.device), value.to(self.device), batch.slot_mapping)
        query = torch.randn(batch.num_tokens, 4, 16, generator=self.generator).bfloat16()
        plan = plan_attention(batch.query_indptr, batch.page_table, **HEADS)
        pages = self.pool.key_pages(1), self.pool.value_pages(1)
        state = paged_attention(query.to(self.device), *pages, plan, return_lse=True)
        table = batch.page_table.to("cpu")
        own = plan_attention(batch.query_indptr.cpu(), table, **HEADS)
        on_cpu = [part.cpu() for part in pages]
        assert_attention_close(AttentionState(state.out.cpu(), state.lse.cpu()), query, *on_cpu, own)
        check_integrity(self.manager)
        return table.indices.tolist(), batch.slot_mapping.tolist()


def bytes_of(pool, pages):
    """What the pages of a pool hold, on the CPU."""
    buffers = [part for layer in range(2) for part in (pool.key_pages(layer), pool.value_pages(layer))]
    return torch.stack([part[list(pages)].cpu() for part in buffers])


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
def test_a_manager_does_what_it_does_on_the_cpu(device, order):
    notes = []
    for steps in (Steps("cpu", order), Steps(device, order)):
        manager, pool, note = steps.manager, steps.pool, []
        first, second = manager.open(()), manager.open(())
        note.append(steps.step([first, second], 9))
        forked = first.fork()
        # A page that both name is copied for one of them.
        note.append(steps.step([first, second, forked], 1))
        saved = bytes_of(pool, first.page_ids)
        manager.swap_out(first)
        # Its pages are given to others and written while the copies may still run.
        third = manager.open(())
        note.append(steps.step([third], 120))
        third.close()
        manager.swap_in(first)
        assert same_bits(bytes_of(pool, first.page_ids), saved)
        note.append(steps.step([first, second, forked], 1))
        notes.append(note)
    assert notes[0] == notes[1]


@pytest.mark.parametrize("order", ["layer_first", "page_first"])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn, "mla"], ids=["bf16", "int8", "fp8", "mla"]
)
def test_pages_survive_in_main_memory_bit_for_bit(device, dtype, order):
    if dtype == "mla":
        spec = MLACacheSpec(num_layers=2, latent_dim=8, rope_dim=4, page_size=4, order=order, dtype=torch.float16)
        pool = MLAPool(spec, 40, device)
    else:
        pool = make_pool(device, dtype, order)
    store = HostPageStore(pool, 30)
    buffer = pool.buffer.view(torch.uint8)
    buffer.random_(256)
    before = buffer.clone()
    source = torch.randperm(40)[:25]
    tickets = store.save(source[:20]), store.save(source[20:].to(device))
    buffer.random_(256)
    store.load(tickets[1], source[20:])
    store.load(tickets[0], source[:20].to(device))
    untouched = torch.tensor(sorted(set(range(40)) - set(source.tolist())))
    buffer_now = buffer.clone()
    other = _copy_of(pool, before)
    mine, was = _pages(pool), _pages(other)
    for part, expected in zip(mine, was, strict=True):
        assert torch.equal(part[source.to(device)], expected[source.to(device)])
        assert not torch.equal(part[untouched.to(device)], expected[untouched.to(device)])
    assert torch.equal(buffer, buffer_now)


def _copy_of(pool, buffer):
    other = type(pool)(pool.spec, pool.num_pages, pool.device)
    other.buffer.view(torch.uint8).copy_(buffer)
    return other


def _pages(pool):
    """The bytes of all pages, whatever the order of the pool."""
    if isinstance(pool, MLAPool):
        views = [pool.pages(layer) for layer in range(2)]
    else:
        views = [part for layer in range(2) for part in (pool.key_pages(layer), pool.value_pages(layer))]
    return [view.contiguous().view(torch.uint8) for view in views]


def test_a_save_is_read_before_what_is_queued_after_it_writes(device):
    """Large pages, and work before and after: the copies are not over when `save` and `load` return."""
    spec = KVCacheSpec(num_layers=8, num_kv_heads=8, head_dim=128, page_size=16, dtype=torch.bfloat16)
    pool = KVPool(spec, 128, device)
    store = HostPageStore(pool, 128)
    pages = torch.arange(128)
    came_back = []
    for turn in range(5):
        pool.buffer.fill_(turn)
        ticket = store.save(pages)
        pool.buffer.fill_(-1)
        store.load(ticket, pages)
        came_back.append((pool.buffer == turn).all())
        pool.buffer.fill_(-2)
        store.drop(ticket)
    store.wait()
    assert all(map(bool, came_back))
