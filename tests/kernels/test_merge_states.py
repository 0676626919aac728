import math

import pytest
import torch

import pagedkv
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_attention_close, assert_close_to_oracle, merge_oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_states(num_tokens=5, num_states=4, num_heads=3, dim=40, dtype=torch.float32):
    return torch.randn(num_tokens, num_states, num_heads, dim).to(dtype), torch.randn(
        num_tokens, num_states, num_heads
    ) * 3


def assert_merged(state, values, lse):
    exact, plain = merge_oracle(values, lse), merge_oracle(values, lse, torch.float32)
    assert_close_to_oracle("out", state.out, exact.out, plain.out)
    assert_close_to_oracle("lse", state.lse, exact.lse, plain.lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_states, dim", [(1, 8), (2, 7), (4, 40), (33, 128)])
def test_merge_is_as_exact_as_torch(dtype, num_states, dim, any_backend):
    values, lse = make_states(num_states=num_states, dim=dim, dtype=dtype)
    state = pagedkv.merge_states(values, lse, backend=any_backend)
    assert state.out.dtype == dtype
    assert_merged(state, values, lse)


def test_states_that_saw_no_key_are_ignored_whatever_they_hold(any_backend):
    values, lse = make_states()
    lse[1, 2], lse[2], lse[3, 0] = -math.inf, -math.inf, -math.inf
    values[lse == -math.inf] = math.nan
    state = pagedkv.merge_states(values, lse, backend=any_backend)
    assert state.out[2].eq(0).all()
    assert state.lse[2].eq(-math.inf).all()
    assert_merged(state, values, lse)


@pytest.mark.parametrize("num_tokens, num_states", [(0, 3), (4, 0)])
def test_nothing_to_merge(num_tokens, num_states, any_backend):
    state = pagedkv.merge_states(*make_states(num_tokens, num_states), backend=any_backend)
    assert state.out.shape == (num_tokens, 3, 40)
    assert state.out.eq(0).all()
    assert state.lse.eq(-math.inf).all()


def test_strides_are_honoured_and_results_contiguous(any_backend):
    values, lse = make_states()
    expected = pagedkv.merge_states(values, lse, backend=any_backend)
    strided = torch.empty(3, 4, 5, 50).permute(2, 1, 0, 3)[..., 3:43].copy_(values)
    strided_lse = torch.empty(3, 5, 8)[..., ::2].permute(1, 2, 0).copy_(lse)
    state = pagedkv.merge_states(strided, strided_lse, backend=any_backend)
    assert state.out.is_contiguous()
    assert state.lse.is_contiguous()
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)


def test_any_number_of_threads_gives_the_same_bits():
    values, lse = make_states(num_tokens=300, dim=128)
    results = []
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        results.append(pagedkv.merge_states(values, lse, backend="cpu"))
    assert all(torch.equal(result.out, results[0].out) for result in results)


def test_a_visible_nan_is_not_hidden(any_backend):
    values, lse = make_states()
    values[0, 1, 0, 0], lse[1, 1, 1] = math.nan, math.nan
    state = pagedkv.merge_states(values, lse, backend=any_backend)
    assert state.out[0, 0, 0].isnan()
    assert state.out[1, 1].isnan().all()
    assert state.out[2:].isfinite().all()


def test_attention_over_two_halves_merges_to_attention_over_all(any_backend):
    whole = attention_batch([3], [64], causal=False)
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        table = pagedkv.PageTable.from_rows([whole.table.indices[half].tolist()], [32], 16)
        plan = pagedkv.plan_attention(
            whole.plan.query_indptr, table, num_q_heads=4, num_kv_heads=2, head_dim=64, causal=False
        )
        pages = whole.key_pages, whole.value_pages
        halves.append(pagedkv.paged_attention(whole.query, *pages, plan, return_lse=True, backend=any_backend))
    values = torch.stack([half.out for half in halves], 1)
    merged = pagedkv.merge_states(values, torch.stack([half.lse for half in halves], 1), backend=any_backend)
    assert_attention_close(merged, whole.query, whole.key_pages, whole.value_pages, whole.plan)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda v, s: (v[0], s), ValueError, r"values must have shape \[T, K, Hq, Dv\], got \[4, 3, 40\]"),
        (lambda v, s: (v, s[:, 1:]), ValueError, r"lse must have shape \[T, K, Hq\] with .*K = 4 \(set by values\)"),
        (lambda v, s: (v, s.double()), TypeError, "lse must have dtype float32, got float64"),
        (lambda v, s: (v.double(), s), TypeError, "values must have dtype float32 or float16 or bfloat16, got float64"),
        (lambda v, s: (v[..., ::2], s), ValueError, "values must have a contiguous last dimension"),
        (lambda v, s: (v, s.to("meta")), ValueError, "lse must be on cpu like values, got meta"),
        (lambda v, s: (v.tolist(), s), TypeError, r"values must be a torch\.Tensor, got list"),
    ],
)
def test_misuse_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        pagedkv.merge_states(*change(*make_states()))


def test_opcheck():
    torch.library.opcheck(torch.ops.pagedkv.merge_states, (*make_states(), "auto"))


def test_compiled_call_gives_the_same_bits():
    values, lse = make_states()
    compiled = torch.compile(pagedkv.merge_states, fullgraph=True, backend="aot_eager")(values, lse)
    assert torch.equal(compiled.out, pagedkv.merge_states(values, lse).out)
