"""How a batch is cut for the programs of a GPU: rows see each of their keys once, and partial rows find each other."""

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import AttentionPlan, PageTable, plan_attention
from pagedkv.kernels.triton.attention_work import divide_attention, tile_heights, work_of
from pagedkv.kernels.triton.runtime import IS_INTERPRETED, num_multiprocessors

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
OPTIONS = {"num_kv_heads": 2, "head_dim": 64, "num_multiprocessors": 4, "causal": True, "window_left": -1}


def divide(query_lens, seq_lens, group=2, **options):
    return divide_attention(
        np.array(query_lens, np.int32), np.array(seq_lens, np.int32), group=group, **{**OPTIONS, **options}
    )


def visible(query_len, seq_len, token, causal, window_left):
    """First and end of the keys that a token may see."""
    position = seq_len - query_len + token
    first = max(position - window_left, 0) if window_left >= 0 else 0
    return first, max(min(position + 1, seq_len), 0) if causal else seq_len


def assert_covers_once(query_lens, seq_lens, group, causal, window_left, work, head_dim):
    """Looks at the items as a kernel does."""
    starts = np.cumsum(query_lens) - query_lens
    spans, slots = defaultdict(list), defaultdict(list)
    taken = np.zeros(work.num_partial_rows, np.int64)
    for height, items in zip(tile_heights(head_dim), work.items, strict=True):
        for seq, first_row, key_start, key_stop, partial in items.tolist():
            assert 0 <= key_start <= key_stop <= max(seq_lens[seq], key_start)
            for row in range(first_row, min(first_row + height, query_lens[seq] * group)):
                spans[seq, row].append((key_start, key_stop))
                if partial >= 0:
                    taken[partial + row - first_row] += 1
                    slots[starts[seq] + row // group, row % group].append((key_start, partial + row - first_row))
    assert (taken == 1).all()
    assert set(spans) == {(seq, row) for seq, length in enumerate(query_lens) for row in range(length * group)}
    for (seq, row), parts in spans.items():
        parts.sort()
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(parts))
        first, stop = visible(query_lens[seq], seq_lens[seq], row // group, causal, window_left)
        assert parts[0][0] <= first or first >= stop
        assert parts[-1][1] >= stop
    merged = {(token, head): (first, step, chunks) for token, head, first, step, chunks in work.merges.tolist()}
    assert len(merged) == len(work.merges) == len(slots)
    for row, parts in slots.items():
        first, step, chunks = merged[row]
        assert [slot for _, slot in sorted(parts)] == [first + chunk * step for chunk in range(chunks)]
        assert chunks > 1


@st.composite
def batches(draw):
    lengths = st.tuples(st.integers(0, 9) | st.integers(0, 150), st.integers(0, 40) | st.integers(0, 3000))
    pairs = draw(st.lists(lengths, max_size=6))
    options = {"causal": draw(st.booleans()), "window_left": draw(st.sampled_from([-1, 0, 7, 300]))}
    return pairs, draw(st.sampled_from([1, 2, 3, 8, 40])), options, draw(st.sampled_from([64, 576]))


@given(batches(), st.sampled_from([1, 4, 132]))
@settings(max_examples=150, deadline=None)
def test_each_row_sees_its_keys_once(batch, num_multiprocessors):
    pairs, group, options, head_dim = batch
    query_lens, seq_lens = ([pair[i] for pair in pairs] for i in range(2))
    work = divide(query_lens, seq_lens, group, head_dim=head_dim, num_multiprocessors=num_multiprocessors, **options)
    assert_covers_once(query_lens, seq_lens, group, work=work, head_dim=head_dim, **options)


def test_a_batch_without_rows_has_no_items():
    for lens in (([], []), ([0, 0], [5, 70_000])):
        work = divide(*lens)
        assert [len(items) for items in work.items] == [0, 0, 0]
        assert (len(work.merges), work.num_partial_rows) == (0, 0)


def test_a_long_sequence_alone_is_cut_for_all_multiprocessors():
    work = divide([1], [131072], group=4, num_kv_heads=8, head_dim=128, num_multiprocessors=132)
    few, some, many = work.items
    assert len(few) * 8 >= 132
    assert (len(some), len(many), len(work.merges)) == (0, 0, 4)


def test_many_short_sequences_are_not_cut():
    work = divide([1] * 256, [200] * 256)
    assert (len(work.items[0]), len(work.merges)) == (256, 0)
    assert (work.items[0][:, 4] == -1).all()


def test_dear_items_come_first():
    few = divide([1, 1, 1], [10, 250, 90]).items[0]
    assert few[:, 0].tolist() == [1, 2, 0]


def make_plan(q_lens=(1, 40), kv_lens=(900, 300)):
    """Without work for the device, as a plan that was unpacked, or moved to another device, may be."""
    rows = [range(-(-kv_len // 16)) for kv_len in kv_lens]
    starts = torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32)
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    plan = plan_attention(starts, PageTable.from_rows(rows, kv_lens, 16, device=DEVICE), **heads)
    return dataclasses.replace(plan, device_work=None)


def test_a_plan_that_was_made_without_gets_its_work_once():
    plan = make_plan()
    work = work_of(plan)
    assert work_of(plan) is work
    own = divide([1, 40], [900, 300], num_multiprocessors=num_multiprocessors(torch.device(DEVICE)))
    for tensor, array in zip(work[:4], (*own.items, own.merges), strict=True):
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == array.tolist()
    assert work.num_partial_rows == own.num_partial_rows


def test_the_work_of_a_plan_goes_with_its_tensors():
    plan = make_plan()
    given = dataclasses.replace(plan, device_work=work_of(plan))
    for one in (plan, given):
        back = AttentionPlan.unpack(*one.pack())
        assert (back.device_work is None) == (one.device_work is None)
        assert back.num_positions == one.num_positions == 900
        assert (back.work is None) == (one.work is None)
    assert all(map(torch.equal, back.device_work[:4], work_of(plan)[:4]))
    assert work_of(back) is back.device_work


@pytest.mark.parametrize(
    "q_lens, kv_lens, expected", [((), (), 0), ((1,), (30,), 30), ((50,), (3,), 48), ((9,), (9,), 9)]
)
def test_positions_of_rows_before_the_first_key_count_too(q_lens, kv_lens, expected):
    assert make_plan(q_lens, kv_lens).num_positions == expected
