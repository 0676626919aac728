import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import AttentionPlanBuffers, AttentionState, PageTable, mla_attention, paged_attention, plan_attention
from pagedkv.kernels.triton.attention_work import divide_attention, tile_heights
from pagedkv.kernels.triton.runtime import IS_INTERPRETED, num_multiprocessors
from pagedkv.kernels.triton.work_capacity import work_capacity
from pagedkv.testing.numeric import assert_attention_close

# Where kernels of the Triton back end run here.
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
PAGE_SIZE = 4
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def make_buffers(max_num_seqs=4, max_num_tokens=12, max_num_pages=40, device=DEVICE, **options):
    options = {**HEADS, **options}
    return AttentionPlanBuffers(max_num_seqs, max_num_tokens, max_num_pages, **options, device=device)


def make_batch(q_lens, kv_lens, device=DEVICE):
    """A table over pages in an order of its own, and where the rows of each sequence begin."""
    ids = itertools.count(3, 7)
    rows = [[next(ids) % 97 for _ in range(-(-kv_len // PAGE_SIZE))] for kv_len in kv_lens]
    starts = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32)
    return starts, PageTable.from_rows(rows, kv_lens, PAGE_SIZE, device=device)


def make_pages(device=DEVICE):
    return [torch.randn(100, PAGE_SIZE, HEADS["num_kv_heads"], HEADS["head_dim"]).to(device) for _ in "kv"]


def make_query(num_tokens, device=DEVICE):
    return torch.randn(num_tokens, HEADS["num_q_heads"], HEADS["head_dim"]).to(device)


BATCHES = (([3, 1, 8], [30, 9, 8]), ([1, 2], [70, 5]), ([12], [40]), ([], []), ([1] * 4, [1] * 4))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("window_left", [-1, 5])
def test_a_run_of_the_first_plan_computes_the_newest_batch(backend, window_left):
    """What the replay of a graph does, which was captured with the first plan."""
    buffers = make_buffers()
    key, value = make_pages()
    plans = []
    for q_lens, kv_lens in BATCHES:
        starts, table = make_batch(q_lens, kv_lens)
        plans.append(plan_attention(starts, table, buffers=buffers, window_left=window_left, **HEADS))
        query = make_query(12)
        out = torch.full_like(query, 7.0)
        paged_attention(query, key, value, plans[0], out=out, backend=backend)
        own = plan_attention(starts, table, window_left=window_left, **HEADS)
        num_tokens = own.num_tokens
        assert torch.equal(out[:num_tokens], paged_attention(query[:num_tokens], key, value, own, backend=backend))
        # The first plan's batch had 12 rows; those beyond a smaller batch are not touched.
        if backend == "triton":
            assert (out[num_tokens:] == 7.0).all()


def test_a_run_of_the_first_plan_has_memory_for_all_parts_of_a_long_sequence():
    """The first batch is cut into nothing that must be merged, the later ones are."""
    buffers = make_buffers(max_num_pages=500, max_query_len=2)
    key, value = make_pages()
    first = plan_attention(*make_batch([1], [3]), buffers=buffers, **HEADS)
    for q_lens, kv_lens in (([1], [1500]), ([0, 1], [700, 900]), ([1], [3])):
        starts, table = make_batch(q_lens, kv_lens)
        plan_attention(starts, table, buffers=buffers, **HEADS)
        query = make_query(1)
        own = plan_attention(starts, table, **HEADS)
        state = paged_attention(query, key, value, first, return_lse=True, backend="triton")
        assert torch.equal(state.out, paged_attention(query, key, value, own, backend="triton"))
        on_cpu = [tensor.cpu() for tensor in (query, key, value)]
        own = plan_attention(*make_batch(q_lens, kv_lens, "cpu"), **HEADS)
        assert_attention_close(AttentionState(*(part.cpu() for part in state)), *on_cpu, own)


def test_a_run_of_the_first_latent_plan_computes_the_newest_batch():
    heads = {"num_q_heads": 3, "num_kv_heads": 1, "head_dim": 20, "value_dim": 16}
    buffers = AttentionPlanBuffers(4, 4, 200, **heads, max_query_len=1)
    latent, rope = (torch.randn(100, PAGE_SIZE, width).to(DEVICE) for width in (16, 4))
    first = plan_attention(*make_batch([1] * 4, [9] * 4), buffers=buffers, **heads)
    for kv_lens in ([600], [5, 70, 1, 33], []):
        starts, table = make_batch([1] * len(kv_lens), kv_lens)
        plan_attention(starts, table, buffers=buffers, **heads)
        query = [torch.randn(4, 3, width).to(DEVICE) for width in (16, 4)]
        out = mla_attention(*query, latent, rope, first, sm_scale=0.2, backend="triton")
        own = plan_attention(starts, table, **heads)
        rows = [part[: len(kv_lens)] for part in query]
        expected = mla_attention(*rows, latent, rope, own, sm_scale=0.2, backend="triton")
        assert torch.equal(out[: len(kv_lens)], expected)


def test_the_newest_plan_runs_on_any_back_end(any_backend):
    device = "cpu" if any_backend == "cpu" else DEVICE
    buffers = make_buffers(device=device)
    key, value = make_pages(device)
    for q_lens, kv_lens in BATCHES:
        starts, table = make_batch(q_lens, kv_lens, device)
        newest = plan_attention(starts, table, buffers=buffers, **HEADS)
        query = make_query(newest.num_tokens, device)
        expected = paged_attention(query, key, value, plan_attention(starts, table, **HEADS), backend=any_backend)
        assert torch.equal(paged_attention(query, key, value, newest, backend=any_backend), expected)


def test_all_plans_are_the_same_memory():
    buffers = make_buffers()
    one = plan_attention(*make_batch([2, 1], [9, 30]), buffers=buffers, **HEADS)
    two = plan_attention(*make_batch([5], [30]), buffers=buffers, **HEADS)
    for name in ("query_indptr", "page_indptr", "page_indices", "seq_lens"):
        assert getattr(one, name).data_ptr() == getattr(two, name).data_ptr()
        assert getattr(one, name).shape == getattr(two, name).shape
    assert one.seq_lens.tolist() == [30, 0, 0, 0]
    assert one.query_indptr.tolist() == [0, 5, 5, 5, 5]
    assert one.page_indptr.tolist() == [0, 8, 8, 8, 8]
    assert (one.num_tokens, two.num_tokens, two.work) == (3, 5, None)
    assert one.num_positions == two.num_positions == 160


def test_a_device_work_is_padded_with_none():
    buffers = make_buffers(max_num_tokens=60, max_num_pages=2000)
    plan = plan_attention(*make_batch([40, 1], [3000, 900]), buffers=buffers, **HEADS)
    own = divide_attention(
        np.array([40, 1]),
        np.array([3000, 900]),
        group=2,
        num_kv_heads=2,
        head_dim=8,
        causal=True,
        window_left=-1,
        num_multiprocessors=num_multiprocessors(torch.device(DEVICE)),
    )
    for items, wanted in zip(plan.device_work[:3], own.items, strict=True):
        assert items[: len(wanted)].tolist() == wanted.tolist()
        assert (items[len(wanted) :, 0] == -1).all()
    assert plan.device_work.merges[: len(own.merges)].tolist() == own.merges.tolist()
    assert (plan.device_work.merges[len(own.merges) :, 4] == 0).all()
    assert plan.device_work.num_partial_rows >= own.num_partial_rows > 0


def test_a_decode_step_has_no_programs_for_many_rows():
    buffers = make_buffers(max_query_len=1)
    few, some, many, _, _ = plan_attention(*make_batch([1, 1], [9, 8]), buffers=buffers, **HEADS).device_work
    assert (few.shape[0] > 0, some.shape[0], many.shape[0]) == (True, 0, 0)


@pytest.mark.parametrize(
    "q_lens, kv_lens, change, words",
    [
        ([1] * 5, [1] * 5, {}, r"at most 4 \(max_num_seqs of the buffers\), got 5"),
        ([7, 6], [7, 6], {}, r"at most 12 \(max_num_tokens of the buffers\), got 13"),
        ([1], [161], {}, r"at most 40 \(max_num_pages of the buffers\), got 41"),
        ([5], [9], {}, r"at most 4 \(max_query_len of the buffers\), got 5"),
        ([1], [101], {}, r"at most 100 \(max_seq_len of the buffers\), got 101"),
        ([1], [9], {"num_kv_heads": 4}, r"num_kv_heads must be 2 \(fixed by the buffers\), got 4. Make other buffers"),
        ([1], [9], {"value_dim": 16}, r"value_dim must be 8 \(fixed by the buffers\), got 16"),
        ([1], [9], {"window_left": 3}, r"window_left must be -1 \(fixed by the buffers\), got 3"),
        ([1], [9], {"causal": False}, r"causal must be True \(fixed by the buffers\), got False"),
        (
            [1],
            [9],
            {"custom_mask": torch.ones(9, dtype=torch.bool)},
            "custom_mask and packed_mask must be None",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(q_lens, kv_lens, change, words):
    buffers = make_buffers(max_query_len=4, max_seq_len=100)
    plan = plan_attention(*make_batch([4, 4], [100, 20]), buffers=buffers, **HEADS)
    before = [tensor.clone() for tensor in plan.pack()[0]]
    with pytest.raises(ValueError, match=words):
        plan_attention(*make_batch(q_lens, kv_lens), buffers=buffers, **{**HEADS, **change})
    assert all(map(torch.equal, before, plan.pack()[0]))


def test_another_page_size_than_before_is_refused():
    buffers = make_buffers()
    plan_attention(*make_batch([1], [9]), buffers=buffers, **HEADS)
    table = PageTable.from_rows([[1]], [2], 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"page_size must be 4 \(fixed by the buffers\), got 16"):
        plan_attention(torch.tensor([0, 1], dtype=torch.int32), table, buffers=buffers, **HEADS)


def test_buffers_must_be_some():
    with pytest.raises(TypeError, match="buffers must be AttentionPlanBuffers, got int"):
        plan_attention(*make_batch([1], [9]), buffers=3, **HEADS)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        ({"max_seq_len": 1.5}, TypeError, "max_seq_len must be an int, got float"),
        ({"num_q_heads": 3}, ValueError, "num_q_heads must be a multiple of num_kv_heads = 2, got 3"),
    ],
)
def test_buffers_refuse(change, error, words):
    with pytest.raises(error, match=words):
        make_buffers(**change)


def test_the_table_of_a_turn_covers_any_batch():
    """Positions are a limit of the buffers, as a graph has the table of cosines that was captured."""
    assert plan_attention(*make_batch([1], [9]), buffers=make_buffers(max_seq_len=50), **HEADS).num_positions == 50
    # Rows without keys stand before the first position.
    assert plan_attention(*make_batch([1], [9]), buffers=make_buffers(max_seq_len=9), **HEADS).num_positions == 13


@st.composite
def batches(draw):
    q_lens = draw(st.lists(st.integers(0, 400) | st.integers(0, 3), max_size=12))
    kv_lens = [draw(st.integers(0, 5000) | st.integers(0, 70_000)) for _ in q_lens]
    group = draw(st.sampled_from([1, 2, 3, 8, 16, 20, 40, 128]))
    options = {
        "num_kv_heads": draw(st.sampled_from([1, 2, 8, 40])),
        "head_dim": draw(st.sampled_from([64, 128, 576])),
        "num_multiprocessors": draw(st.sampled_from([1, 4, 132])),
    }
    cut = {"causal": draw(st.booleans()), "window_left": draw(st.sampled_from([-1, 0, 100, 4000]))}
    return np.array(q_lens, np.int32), np.array(kv_lens, np.int32), group, options, cut


def test_a_run_of_few_rows_writes_no_others_whatever_batch_is_in_the_buffers():
    """As a graph that was captured for fewer tokens than the newest plan has."""
    buffers = make_buffers(max_num_seqs=2, max_num_pages=2000)
    small = plan_attention(*make_batch([1], [4]), **HEADS, buffers=buffers)
    pages = make_pages()
    around = torch.full((20, HEADS["num_q_heads"], HEADS["head_dim"]), 7.0, device=DEVICE)
    for q_lens, kv_lens in (([4, 3], [30, 5]), ([12], [40]), ([1, 1], [7000, 900])):  # the last is cut and merged
        plan_attention(*make_batch(q_lens, kv_lens), **HEADS, buffers=buffers)
        paged_attention(make_query(1), *pages, small, out=around[4:5], backend="triton")
        assert (around[:4] == 7).all()
        assert (around[5:] == 7).all()
        assert (around[4] != 7).any()


def test_a_run_of_few_latent_rows_writes_no_others():
    heads = {"num_q_heads": 4, "num_kv_heads": 1, "head_dim": 24, "value_dim": 16}
    buffers = AttentionPlanBuffers(2, 12, 2000, **heads, device=DEVICE)
    small = plan_attention(*make_batch([1], [4]), **heads, buffers=buffers)
    latents, ropes = (torch.randn(100, PAGE_SIZE, dim).to(DEVICE) for dim in (16, 8))
    around = torch.full((20, 4, 16), 7.0, device=DEVICE)
    for q_lens, kv_lens in (([4, 3], [30, 5]), ([1, 1], [7000, 900])):
        plan_attention(*make_batch(q_lens, kv_lens), **heads, buffers=buffers)
        queries = (torch.randn(1, 4, dim).to(DEVICE) for dim in (16, 8))
        mla_attention(*queries, latents, ropes, small, sm_scale=0.2, out=around[4:5], backend="triton")
        assert (around[:4] == 7).all()
        assert (around[5:] == 7).all()


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy, pickle.dumps])
def test_buffers_are_neither_copied_nor_pickled(call):
    with pytest.raises(TypeError, match="must stay where they are"):
        call(make_buffers())


@given(batches())
@settings(max_examples=300, deadline=None)
def test_no_batch_has_more_work_than_its_limits_say(batch):
    q_lens, kv_lens, group, options, cut = batch
    most = work_capacity(
        max_num_seqs=max(len(q_lens), 1),
        max_num_tokens=max(int(q_lens.sum()), 1),
        max_query_len=max(int(q_lens.max(initial=0)), 1),
        max_seq_len=max(int(kv_lens.max(initial=0)), 1),
        group=group,
        **options,
    )
    work = divide_attention(q_lens, kv_lens, group=group, **options, **cut)
    assert [len(items) <= limit for items, limit in zip(work.items, most.items, strict=True)] == [True] * 3
    assert len(work.merges) <= most.merges
    assert work.num_partial_rows <= most.num_partial_rows


def test_limits_of_a_decode_step_are_not_far_above_its_work():
    """64 sequences of 4,096 tokens, 32 heads over 8: as many programs again as it needs at most."""
    options = {"group": 4, "num_kv_heads": 8, "head_dim": 128, "num_multiprocessors": 132}
    most = work_capacity(max_num_seqs=64, max_num_tokens=64, max_query_len=1, max_seq_len=131072, **options)
    work = divide_attention(np.ones(64, np.int32), np.full(64, 4096, np.int32), causal=True, window_left=-1, **options)
    assert most.items[1:] == (0, 0)
    assert most.items[0] <= 2 * len(work.items[0])
    assert tile_heights(128)[0] == 16
