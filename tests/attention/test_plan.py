import pytest
import torch

from pagedkv import PageTable, plan_attention


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


def test_plan_refuses_a_raw_tensor_for_the_table():
    with pytest.raises(TypeError, match="table must be a PageTable, got Tensor. Build it with PageTable.from_rows"):
        plan_attention(int32(0, 1), torch.zeros(1, 1, dtype=torch.int32), **HEADS)
