"""Captured CUDA graphs that are replayed with later plans, and calls that wait for nothing."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch

from pagedkv import (
    AttentionPlanBuffers,
    PageTable,
    RotaryEmbedding,
    mla_attention,
    paged_attention,
    plan_attention,
    store_kv,
)
from pagedkv.kernels import AttentionState
from pagedkv.testing.numeric import assert_attention_close

NUM_PAGES, PAGE_SIZE = 600, 16
HEADS = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}
LATENT = {"num_q_heads": 16, "num_kv_heads": 1, "head_dim": 576, "value_dim": 512}
# New and total tokens: of one token each, then of any number.
DECODE = (([1] * 6, [900, 1, 17, 2000, 16, 300]), ([1], [5000]), ([1] * 8, [33] * 8), ([], []), ([1, 1], [4096, 1]))
MIXED = (([70, 1, 200], [900, 800, 200]), ([300], [300]), ([1] * 8, [77] * 8), ([5, 0, 64], [5000, 9, 64]))


def make_batch(q_lens, kv_lens, device):
    """On the device, but for where the rows begin."""
    ids = itertools.count(5, 7)
    rows = [[next(ids) % NUM_PAGES for _ in range(-(-kv_len // PAGE_SIZE))] for kv_len in kv_lens]
    starts = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    return starts, PageTable.from_rows(rows, kv_lens, PAGE_SIZE, device=device)


def make_pages(device, dtype, *shape):
    return torch.randn(NUM_PAGES, PAGE_SIZE, *shape).to(dtype).to(device)


@contextmanager
def no_waiting():
    """An error where torch would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run):
    """The graph of a call, which was run before: that compiles its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize(
    "options",
    [{}, {"window_left": 700}, {"soft_cap": 20.0}, {"rope": RotaryEmbedding(dim=64)}],
    ids=["plain", "window", "cap", "rope"],
)
@pytest.mark.parametrize("batches, max_query_len", [(DECODE, 1), (MIXED, 300)], ids=["decode", "mixed"])
def test_a_graph_replays_with_the_newest_plan(device, batches, max_query_len, options):
    options = dict(options)
    window = {"window_left": options.pop("window_left", -1)}
    key, value = (make_pages(device, torch.bfloat16, 2, 64) for _ in "kv")
    num_tokens = max(sum(q_lens) for q_lens, _ in batches)
    limits = {"max_query_len": max_query_len, "max_seq_len": 5000}
    buffers = AttentionPlanBuffers(8, num_tokens, 600, **HEADS, **limits, device=device)
    query = torch.zeros(num_tokens, 8, 64, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(query)
    # The largest batch, so that the graph has all rows of the query and the result.
    first = max(batches, key=lambda batch: sum(batch[0]))
    plan = plan_attention(*make_batch(*first, device), buffers=buffers, **window, **HEADS)
    states = []

    def run():
        states[:] = [paged_attention(query, key, value, plan, out=out, return_lse=True, backend="triton", **options)]

    graph = captured(run)
    for q_lens, kv_lens in batches:
        starts, table = make_batch(q_lens, kv_lens, device)
        plan_attention(starts, table, buffers=buffers, **window, **HEADS)
        rows = sum(q_lens)
        query.normal_()
        out.fill_(7.0)
        graph.replay()
        result = AttentionState(out[:rows].cpu(), states[0].lse[:rows].cpu())
        own = plan_attention(starts, make_batch(q_lens, kv_lens, "cpu")[1], **window, **HEADS)
        assert_attention_close(result, query[:rows].cpu(), key.cpu(), value.cpu(), own, **options)
        assert (out[rows:] == 7.0).all()


def test_a_graph_of_latent_attention_replays_with_the_newest_plan(device):
    pages = make_pages(device, torch.bfloat16, 576)
    buffers = AttentionPlanBuffers(8, 8, 600, **LATENT, max_query_len=1, device=device)
    query = torch.zeros(8, 16, 576, dtype=torch.bfloat16, device=device)
    out = torch.zeros(8, 16, 512, dtype=torch.bfloat16, device=device)
    plan = plan_attention(*make_batch(*DECODE[2], device), buffers=buffers, **LATENT)

    def run(rows=8, chosen=plan):
        parts = query[:rows, :, :512], query[:rows, :, 512:], pages[:, :, :512], pages[:, :, 512:]
        return mla_attention(*parts, chosen, sm_scale=0.07, backend="triton")

    def run_to_out():
        out.copy_(run())

    graph = captured(run_to_out)
    for q_lens, kv_lens in DECODE:
        starts, table = make_batch(q_lens, kv_lens, device)
        plan_attention(starts, table, buffers=buffers, **LATENT)
        query.normal_()
        graph.replay()
        own = plan_attention(starts, table, **LATENT)
        # The same cut into the same programs.
        assert torch.equal(out[: len(q_lens)], run(len(q_lens), own))


def test_a_graph_of_a_layer_stores_to_the_newest_slots(device):
    key_pages, value_pages = (make_pages(device, torch.bfloat16, 2, 64) for _ in "kv")
    key, value = (torch.zeros(8, 2, 64, dtype=torch.bfloat16, device=device) for _ in "kv")
    slots = torch.full((8,), -1, device=device)
    graph = captured(lambda: store_kv(key, value, key_pages, value_pages, slots, backend="triton"))
    expected = key_pages.clone()
    for wanted in ([3, 999, -1, 40, 41, 42, 43, 44], [5, -1, -1, -1, -1, -1, -1, 9599]):
        key.normal_()
        slots.copy_(torch.tensor(wanted))
        graph.replay()
        for token, slot in enumerate(wanted):
            if slot >= 0:
                expected[slot // PAGE_SIZE, slot % PAGE_SIZE] = key[token]
        assert torch.equal(key_pages, expected)


@pytest.mark.parametrize("with_buffers", [False, True])
def test_plan_and_run_wait_for_nothing(device, with_buffers):
    key, value = (make_pages(device, torch.bfloat16, 2, 64) for _ in "kv")
    query = torch.randn(8, 8, 64, device=device).bfloat16()
    tokens = torch.randn(8, 2, 64, device=device).bfloat16()
    slots = torch.arange(8, device=device)
    buffers = AttentionPlanBuffers(8, 8, 600, **HEADS, device=device) if with_buffers else None

    def step():
        starts, table = make_batch([1] * 8, [77] * 8, device)
        plan = plan_attention(starts, table, buffers=buffers, **HEADS)
        store_kv(tokens, tokens, key, value, slots, backend="triton")
        return paged_attention(query, key, value, plan, backend="triton")

    expected = step()
    with no_waiting():
        results = [step() for _ in range(5)]
    assert all(torch.equal(result, expected) for result in results)


def test_plans_in_a_row_do_not_overtake_each_other(device):
    """Twice as many as there are staging buffers, while the device is still busy with the first."""
    key, value = (make_pages(device, torch.bfloat16, 2, 64) for _ in "kv")
    query = torch.randn(1, 8, 64, device=device).bfloat16()
    buffers = AttentionPlanBuffers(1, 1, 600, **HEADS, device=device)
    lengths = [1, 4000, 17, 900, 33, 2500]
    batches = [make_batch([1], [length], device) for length in lengths]
    busy = torch.randn(4096, 4096, device=device)
    results = []
    for starts, table in batches:
        plan = plan_attention(starts, table, buffers=buffers, **HEADS)
        for _ in range(5):
            busy = busy @ busy * 1e-3
        results.append(paged_attention(query, key, value, plan, backend="triton"))
    for (starts, table), result in zip(batches, results, strict=True):
        own = plan_attention(starts, table, **HEADS)
        assert torch.equal(result, paged_attention(query, key, value, own, backend="triton"))
