import dataclasses
import itertools

import pytest
import torch

from pagedkv import PageTable, paged_attention, plan_attention
from pagedkv.testing.attention_work import CHUNK_TOKENS, assert_covers_once, read_work


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make_table():
    return PageTable.from_rows([[3, 7], [5]], seq_lens=[6, 4], page_size=4)


HEADS = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 8}


def test_plan_carries_what_the_kernels_need():
    plan = plan_attention(int32(0, 2, 3), make_table(), **HEADS, window_left=3)
    assert (plan.num_seqs, plan.num_tokens, plan.max_page, plan.group) == (2, 3, 7, 3)
    assert (plan.value_dim, plan.page_size, plan.window_left, plan.causal) == (8, 4, 3, True)
    assert plan.seq_lens.tolist() == [6, 4]


def test_mask_indptr_counts_each_sequences_matrix():
    plan = plan_attention(int32(0, 2, 3), make_table(), **HEADS, custom_mask=torch.ones(16, dtype=torch.bool))
    assert plan.mask_indptr.tolist() == [0, 12, 16]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"num_q_heads": 5}, ValueError, "num_q_heads must be a multiple of num_kv_heads = 2, got 5"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"window_left": -2}, ValueError, "window_left must be at least -1, got -2"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads must be an int, got float"),
        ({"custom_mask": torch.ones(15, dtype=torch.bool)}, ValueError, r"with a sum of 16, got \[15\]"),
        ({"custom_mask": torch.ones(16)}, TypeError, "custom_mask must have dtype bool, got float32"),
    ],
)
def test_plan_refuses(change, error, words):
    with pytest.raises(error, match=words):
        plan_attention(int32(0, 2, 3), make_table(), **{**HEADS, **change})


@pytest.mark.parametrize(
    "query_indptr, error, words",
    [
        (torch.tensor([0, 2, 3]), TypeError, "query_indptr must have dtype int32, got int64"),
        (
            int32(0, 2),
            ValueError,
            r"query_indptr must have shape \[S \+ 1\] with S = 2 \(set by the page table\), got \[2\]",
        ),
        (int32(1, 2, 3), ValueError, r"query_indptr must start with 0 and not decrease, got \[1, 2, 3\]"),
        (int32(0, 2, 1), ValueError, r"query_indptr must start with 0 and not decrease, got \[0, 2, 1\]"),
    ],
)
def test_plan_refuses_query_indptr(query_indptr, error, words):
    with pytest.raises(error, match=words):
        plan_attention(query_indptr, make_table(), **HEADS)


def test_plan_refuses_a_truthy_value_for_causal():
    with pytest.raises(TypeError, match="causal must be a bool, got str"):
        plan_attention(int32(0, 1, 2), make_table(), causal="no", **HEADS)


def test_plan_refuses_more_heads_than_any_model_has():
    with pytest.raises(ValueError, match="num_q_heads must be at most 65536, got 1099511627776"):
        plan_attention(int32(0, 1, 2), make_table(), num_q_heads=2**40, num_kv_heads=2, head_dim=8)


@pytest.mark.native
def test_plan_refuses_more_rows_than_can_be_cut():
    with pytest.raises(ValueError, match="query rows a KV head must be at most 2147483648"):
        plan_attention(int32(0, 2**30, 2**30), make_table(), num_q_heads=64, num_kv_heads=1, head_dim=8)


@pytest.mark.native
def test_shared_prefixes_take_bounded_room():
    """Where the results of shared chunks would fill the memory, the rest of the sequences read for themselves."""
    num_seqs, kv_len = 64, 131072
    common = list(range(kv_len // 16))
    plan = make_plan(
        [1] * num_seqs,
        [[*common, len(common) + i] for i in range(num_seqs)],
        [kv_len + 5] * num_seqs,
        num_q_heads=64,
        num_kv_heads=8,
        head_dim=128,
    )
    assert 0 < read_work(plan).num_states <= 2**19 + 2 * 513 * 64
    assert_covers_once(plan)


def test_plan_refuses_a_raw_tensor_for_the_table():
    with pytest.raises(TypeError, match="table must be a PageTable, got Tensor. Build it with PageTable.from_rows"):
        plan_attention(int32(0, 1), torch.zeros(1, 1, dtype=torch.int32), **HEADS)


# The work: how the native core cuts a batch for threads.


def make_plan(q_lens, rows, kv_lens, *, num_threads=2, page_size=16, **options):
    torch.set_num_threads(num_threads)
    table = PageTable.from_rows(rows, kv_lens, page_size)
    plan = plan_attention(int32(0, *itertools.accumulate(q_lens)), table, **{**HEADS, **options})
    torch.set_num_threads(2)
    return plan


def apart(kv_lens, page_size=16):
    """Pages for each sequence alone."""
    ids = itertools.count()
    return [[next(ids) for _ in range(-(-kv_len // page_size))] for kv_len in kv_lens]


@pytest.mark.native
def test_work_serves_all_layers_of_a_step():
    kv_lens = [700, 30, 260]
    plan = make_plan([1, 4, 20], apart(kv_lens), kv_lens, num_threads=8)
    before = plan.work.clone()
    assert (plan.work.dtype, plan.work.dim(), plan.work.is_contiguous()) == (torch.int64, 1, True)
    for _ in range(3):
        pages, query = torch.randn(2, plan.max_page + 1, 16, 2, 8), torch.randn(25, 6, 8)
        planned = paged_attention(query, *pages, plan, return_lse=True, backend="cpu")
        anew = paged_attention(query, *pages, dataclasses.replace(plan, work=None), return_lse=True, backend="cpu")
        assert torch.equal(planned.out, anew.out)
        assert torch.equal(planned.lse, anew.lse)
    assert torch.equal(plan.work, before)


@pytest.mark.native
def test_work_is_the_plans_own():
    query_indptr = int32(0, 1, 2)
    kv_lens = [600, 500]
    table = PageTable.from_rows(apart(kv_lens), kv_lens, 16)
    plan = plan_attention(query_indptr, table, **HEADS)
    before = plan.work.clone()
    query_indptr[1] = 2
    plan_attention(query_indptr, table, **HEADS)
    assert torch.equal(plan.work, before)
    assert plan.query_indptr.tolist() == [0, 1, 2]


@pytest.mark.native
def test_workspace_bytes_are_those_of_partial_results():
    whole = make_plan([1], apart([2000]), [2000], num_threads=1)
    assert (read_work(whole).num_states, whole.workspace_bytes) == (0, 0)
    # Eight chunks of two KV heads with three rows each, computed apart: a row is its values, padded to sixteen, its
    # highest logit and its sum.
    split = make_plan([1], apart([2000]), [2000], num_threads=8)
    assert read_work(split).num_states == 8 * 2 * 3
    assert split.workspace_bytes == 8 * 2 * 3 * 4 * (16 + 2)
    assert make_plan([1], apart([2000]), [2000], num_threads=8, value_dim=40).workspace_bytes == 48 * 4 * (48 + 2)
    assert dataclasses.replace(split, work=None).workspace_bytes == 0


@pytest.mark.native
@pytest.mark.parametrize("planned, run", [(1, 2), (1, 7), (2, 1), (7, 1), (64, 2), (7, 2)])
@pytest.mark.parametrize("options", [{}, {"window_left": 300}, {"causal": False}], ids=str)
def test_a_plan_for_other_threads_gives_the_same_bits(planned, run, options):
    q_lens, kv_lens = [1, 70, 1, 0, 3], [1500, 300, 1490, 40, 600]
    rows = apart(kv_lens)
    rows[2][:60] = rows[0][:60]
    plans = [make_plan(q_lens, rows, kv_lens, num_threads=number, **options) for number in (planned, run)]
    pages, query = torch.randn(2, plans[0].max_page + 1, 16, 2, 8), torch.randn(75, 6, 8)
    torch.set_num_threads(run)
    states = [paged_attention(query, *pages, plan, return_lse=True, backend="cpu") for plan in plans]
    assert not torch.equal(plans[0].work, plans[1].work)
    assert torch.equal(states[0].out, states[1].out)
    assert torch.equal(states[0].lse, states[1].lse)


def cost(plan, work, item):
    """Multiply-adds of one column; to read a key costs about as much as eight rows."""
    shared = (item.chunk_last - item.chunk_first - 1) * CHUNK_TOKENS + item.shared_tokens
    total = shared * (work.rows_of(item) + 8)
    for member in work.members_of(item):
        kv_len = int(plan.seq_lens[work.tiles[member].sequence])
        own = min(kv_len - (item.chunk_last - 1) * CHUNK_TOKENS, CHUNK_TOKENS) - item.shared_tokens
        total += max(0, own) * (work.tiles[member].rows + 8)
    return total * (item.head_last - item.head_first)


SKEWED = {
    "one-long": ([1], [100_000]),
    "one-long-among-short": ([1] * 60, [100_000] + [40] * 59),
    "one-chunk-each": ([1] * 3, [100, 200, 256]),
    "few-of-few-chunks": ([1, 1], [700, 300]),
    "a-prompt-among-decodes": ([1, 3000, 1], [5000, 3000, 300]),
    "two-prompts": ([500, 20], [500, 6000]),
    "appends": ([30, 4, 1], [20_000, 9000, 100]),
    "all-alike": ([1] * 32, [2048] * 32),
}


@pytest.mark.native
@pytest.mark.parametrize("num_threads", [2, 8])
@pytest.mark.parametrize("num_kv_heads, group", [(1, 1), (2, 3), (8, 4), (1, 32)])
@pytest.mark.parametrize("shared_tokens", [0, 4096])
@pytest.mark.parametrize("name", SKEWED)
def test_no_item_keeps_the_other_threads_waiting(name, shared_tokens, num_kv_heads, group, num_threads):
    q_lens, own_lens = SKEWED[name]
    kv_lens = [own + shared_tokens for own in own_lens]
    rows = apart(kv_lens)
    for row in rows:
        row[: shared_tokens // 16] = rows[0][: shared_tokens // 16]
    heads = {"num_q_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads}
    plan = make_plan(q_lens, rows, kv_lens, num_threads=num_threads, **heads)
    assert_covers_once(plan)
    work = read_work(plan)
    costs = [cost(plan, work, item) for item in work.items]
    one_chunk = [CHUNK_TOKENS * (work.rows_of(item) + 8) * (item.head_last - item.head_first) for item in work.items]
    # What is a tenth too dear is not cut, and nothing is cut within a chunk.
    limit = 1.1 * sum(costs) / (4 * num_threads)
    assert all(item <= limit + chunk for item, chunk in zip(costs, one_chunk, strict=True))
    # Dearest first, so that the last ones fill the gaps.
    dearest = max(costs)
    assert costs[0] >= dearest - one_chunk[0]


@pytest.mark.native
def test_one_thread_cuts_no_sequence():
    kv_lens = [100_000, 40, 600]
    work = read_work(make_plan([1, 30, 0], apart(kv_lens), kv_lens, num_threads=1))
    assert work.num_states == 0
    assert {(item.chunk_first, item.chunk_last) for item in work.items} == {(0, 391), (0, 1)}


def packed(mask, sizes):
    """Bits of each sequence, the lowest first, from a byte of its own on; what fills the last byte is set."""
    parts = []
    for bits in mask.split(sizes):
        bits = torch.cat([bits, bits.new_ones(-len(bits) % 8)]).view(-1, 8)
        parts.append((bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


@pytest.mark.parametrize(
    "q_lens, kv_lens",
    [([2, 1], [6, 4]), ([1, 3, 8], [7, 5, 16]), ([0, 5, 1], [9, 0, 8]), ([], []), ([40, 1], [300, 17])],
    ids=str,
)
def test_a_packed_mask_is_the_mask(q_lens, kv_lens):
    sizes = [q_len * kv_len for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
    mask = torch.rand(sum(sizes)) < 0.6
    of_bools = make_plan(q_lens, apart(kv_lens), kv_lens, custom_mask=mask)
    of_bits = make_plan(q_lens, apart(kv_lens), kv_lens, packed_mask=packed(mask, sizes))
    assert of_bits.custom_mask.dtype == torch.bool
    assert torch.equal(of_bits.custom_mask, of_bools.custom_mask)
    assert torch.equal(of_bits.mask_indptr, of_bools.mask_indptr)
    pages, query = torch.randn(2, of_bits.max_page + 1, 16, 2, 8), torch.randn(sum(q_lens), 6, 8)
    outs = [paged_attention(query, *pages, plan) for plan in (of_bools, of_bits)]
    assert torch.equal(*outs)


def test_the_lowest_bit_comes_first_and_each_sequence_has_bytes_of_its_own():
    plan = make_plan([1, 2], [[0], [1]], [3, 5], packed_mask=torch.tensor([0b101, 0b00010010, 0b11], dtype=torch.uint8))
    seen = [[1, 0, 1], [0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]
    assert plan.custom_mask.tolist() == [bool(bit) for bits in seen for bit in bits]
    assert plan.mask_indptr.tolist() == [0, 3, 13]


@pytest.mark.parametrize(
    "masks, error, words",
    [
        (
            {"packed_mask": torch.ones(3, dtype=torch.uint8), "custom_mask": torch.ones(16, dtype=torch.bool)},
            ValueError,
            "packed_mask must not be given with custom_mask, got both. Pass one of them",
        ),
        (
            {"packed_mask": torch.ones(2, dtype=torch.uint8)},
            ValueError,
            r"packed_mask must have shape \[sum ceil\(q_len \* kv_len / 8\)\] with a sum of 3, got \[2\]",
        ),
        ({"packed_mask": torch.ones(3, 1, dtype=torch.uint8)}, ValueError, r"with a sum of 3, got \[3, 1\]"),
        ({"packed_mask": torch.ones(3, dtype=torch.bool)}, TypeError, "packed_mask must have dtype uint8, got bool"),
        ({"packed_mask": [1, 2, 3]}, TypeError, "packed_mask must be a torch.Tensor, got list"),
        ({"packed_mask": torch.ones(3, dtype=torch.uint8, device="meta")}, ValueError, "packed_mask must be on cpu"),
    ],
)
def test_a_packed_mask_is_refused(masks, error, words):
    with pytest.raises(error, match=words):
        plan_attention(int32(0, 2, 3), make_table(), **HEADS, **masks)


# Tensors on the device "meta" have shapes and no contents: what reads one back fails.


def test_a_plan_over_a_table_of_the_host_reads_nothing_back():
    rows, kv_lens = [range(8), range(3), []], [30, 9, 0]
    starts = int32(0, 3, 4, 6)
    here = plan_attention(starts, PageTable.from_rows(rows, kv_lens, 4), **HEADS)
    table = PageTable.from_rows(rows, kv_lens, 4, device="meta")
    mask = torch.ones(3 * 30 + 9, dtype=torch.bool, device="meta")
    there = plan_attention(starts, table, custom_mask=mask, **HEADS)
    for name in ("query_indptr", "page_indptr", "page_indices", "seq_lens"):
        assert getattr(there, name).shape == getattr(here, name).shape
        assert getattr(there, name).device.type == "meta"
    for name in ("num_tokens", "max_page", "num_positions"):
        assert getattr(there, name) == getattr(here, name)
    assert there.mask_indptr.shape == (4,)
    assert (there.work, there.device_work) == (None, None)
