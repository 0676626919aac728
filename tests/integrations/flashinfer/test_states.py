import math

import pytest
import torch

from pagedkv.integrations.flashinfer.states import (
    merge_state,
    merge_state_in_place,
    merge_states,
    variable_length_merge_states,
)
from pagedkv.testing.numeric import assert_close_to_oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def states(*shape, dtype=torch.float32):
    """v [..., H, D] and s [..., H]."""
    return torch.randn(shape).to(dtype), torch.randn(shape[:-1]) * 4


def merged(v, s, arithmetic=torch.float64):
    """v [n, K, H, D], s [n, K, H]: weights of powers of two, in one step; states that have seen no key are left out."""
    total = torch.log2(torch.exp2(s.to(arithmetic)).sum(1))
    weights = torch.exp2(s.to(arithmetic) - total.masked_fill(total == -math.inf, 0.0)[:, None])
    return (torch.where(s[..., None] > -math.inf, v.to(arithmetic), 0.0) * weights[..., None]).sum(1), total


def assert_merged(actual, v, s):
    (exact_v, exact_s), (plain_v, plain_s) = merged(v, s), merged(v, s, torch.float32)
    assert (actual[0].dtype, actual[1].dtype) == (v.dtype, torch.float32)
    assert_close_to_oracle("v", actual[0], exact_v, plain_v)
    assert_close_to_oracle("s", actual[1], exact_s, plain_s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_states, dim", [(2, 8), (3, 7), (33, 64)])
def test_merged_states_are_as_exact_as_torch(dtype, num_states, dim):
    v, s = states(6, num_states, 3, dim, dtype=dtype)
    assert_merged(merge_states(v, s), v, s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_states(dtype):
    v, s = states(6, 2, 3, 16, dtype=dtype)
    given = v[:, 0], s[:, 0], v[:, 1], s[:, 1]
    result = merge_state(*given)
    assert_merged(result, v, s)
    # As views of other strides, and in place on views of a wider tensor.
    wide_v, wide_s = torch.full((6, 5, 20), torch.nan, dtype=dtype), torch.full((6, 5), torch.nan)
    own_v, own_s = wide_v[:, 1:4, 2:18].copy_(given[0]), wide_s[:, 1:4].copy_(given[1])
    assert merge_state_in_place(own_v, own_s, *given[2:]) is None
    assert torch.equal(own_v, result[0])
    assert torch.equal(own_s, result[1])
    assert int(wide_v.isnan().sum()) == wide_v.numel() - own_v.numel()
    assert int(wide_s.isnan().sum()) == wide_s.numel() - own_s.numel()


def test_the_base_is_two():
    ones = torch.ones(1, 1, 1)
    v, s = merge_state(ones, torch.tensor([[3.0]]), 3 * ones, torch.tensor([[3.0]]))
    assert (v.item(), s.item()) == (2.0, 4.0)
    v, s = merge_state(4 * ones, torch.tensor([[1.0]]), 0 * ones, torch.tensor([[0.0]]))
    # Of weights 2 and 1: two thirds of 4, one rounding each of the weight, the product and the quotient.
    assert v.item() == pytest.approx(8 / 3, rel=3 * torch.finfo(torch.float32).eps)


def test_states_far_from_zero_are_merged_by_their_distance():
    v, s = states(4, 3, 2, 8)
    for shift in (-3e4, 3e4):
        far_v, far_s = merge_states(v, s.round() + shift)
        near_v, near_s = merge_states(v, s.round())
        assert torch.equal(far_v, near_v)
        rounding = torch.finfo(torch.float32).eps * abs(shift)
        assert float((far_s - shift - near_s).abs().max()) <= rounding


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_states_that_have_seen_no_key_are_ignored(garbage):
    v, s = states(5, 2, 3, 8)
    s[0, 0], s[1, 1], s[2] = -math.inf, -math.inf, -math.inf
    v[s == -math.inf] = garbage
    out, lse = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert_merged((out, lse), v, s)
    assert torch.equal(out[0], v[0, 1])
    assert torch.equal(lse[0], s[0, 1]), "alone, s stays as it is to the bit"
    assert torch.equal(out[1], v[1, 0])
    assert torch.equal(lse[1], s[1, 0])
    assert out[2].eq(0).all()
    assert lse[2].eq(-math.inf).all()
    own_v, own_s = v[:, 0].clone(), s[:, 0].clone()
    merge_state_in_place(own_v, own_s, v[:, 1], s[:, 1])
    assert torch.equal(own_v, out)
    assert torch.equal(own_s, lse)


@pytest.mark.parametrize("num_rows, num_states", [(0, 3), (0, 0), (4, 0)])
def test_nothing_to_merge(num_rows, num_states):
    out, lse = merge_states(*states(num_rows, num_states, 3, 8, dtype=torch.float16))
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        (num_rows, 3, 8),
        torch.float16,
        (num_rows, 3),
        torch.float32,
    )
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()


def test_one_state_is_returned_as_it_is():
    v, s = states(4, 1, 3, 8)
    v[2], s[2] = torch.nan, -math.inf
    out, lse = merge_states(v, s)
    assert torch.equal(out.nan_to_num(7.0), v[:, 0].nan_to_num(7.0))
    assert torch.equal(lse, s[:, 0])
    out.zero_()
    assert v[:2].ne(0).any(), "the result is a tensor of its own"


def test_no_rows():
    v, s = states(0, 3, 8)
    assert merge_state(v, s, v.clone(), s.clone())[0].shape == (0, 3, 8)
    merge_state_in_place(v, s, v.clone(), s.clone(), torch.zeros(0, dtype=torch.bool))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_masked_rows_stay_as_they_are(mask_dtype):
    v, s = states(6, 2, 3, 8)
    v[3, 0], v[1, 1] = torch.nan, torch.nan
    mask = torch.tensor([1, 0, 2, 0, 3, 1]).to(mask_dtype)
    expected_v, expected_s = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    own_v, own_s = v[:, 0].clone(), s[:, 0].clone()
    merge_state_in_place(own_v, own_s, v[:, 1], s[:, 1], mask)
    kept, rows = mask == 0, mask != 0
    assert torch.equal(own_v[kept].view(torch.int32), v[:, 0][kept].view(torch.int32))
    assert torch.equal(own_s[kept], s[:, 0][kept])
    assert torch.equal(own_v[rows], expected_v[rows])
    assert torch.equal(own_s[rows], expected_s[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_s_of_another_dtype_is_updated_too(dtype):
    v, s = states(6, 2, 3, 8, dtype=torch.float16)
    s = s.to(dtype)
    expected = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    own_v, own_s = v[:, 0].clone(), s[:, 0].clone()
    merge_state_in_place(own_v, own_s, v[:, 1], s[:, 1])
    assert torch.equal(own_v, expected[0])
    assert own_s.dtype == dtype
    assert torch.equal(own_s, expected[1].to(dtype))
    assert not torch.equal(own_s, s[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_with_numbers_of_states_of_their_own(dtype, index_dtype):
    indptr = [0, 3, 3, 4, 11, 11]
    # Two states beyond indptr[-1] that belong to no row.
    v, s = states(13, 3, 8, dtype=dtype)
    v[11:], s[11:] = torch.nan, torch.nan
    s[5], s[3, 1] = -math.inf, -math.inf
    v[5] = torch.nan
    out, lse = variable_length_merge_states(v, s, torch.tensor(indptr, dtype=index_dtype))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for row in range(5):
        own = slice(indptr[row], indptr[row + 1])
        assert_merged((out[row : row + 1], lse[row : row + 1]), v[None, own], s[None, own])
    assert out[[1, 4]].eq(0).all()
    assert lse[[1, 4]].eq(-math.inf).all()


@pytest.mark.parametrize("indptr", [[0], [0, 0, 0]])
def test_rows_without_any_state(indptr):
    out, lse = variable_length_merge_states(*states(0, 3, 8), torch.tensor(indptr))
    assert out.shape == (len(indptr) - 1, 3, 8)
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"v_other": torch.zeros(4, 3, 7)}, ValueError, r"v_other must have shape \[n, H, D\] with .*D = 8"),
        ({"v_other": torch.zeros(4, 3, 8).half()}, ValueError, "v_other must have dtype float32 like v, got float16"),
        ({"s_other": torch.zeros(4, 2)}, ValueError, r"s_other must have shape \[n, H\] with .*H = 3"),
        (
            {"s_other": torch.zeros(4, 3, dtype=torch.int32)},
            ValueError,
            "s_other must have a floating dtype, got int32",
        ),
        ({"mask": torch.ones(3)}, ValueError, r"mask must have shape \[n\] with n = 4"),
        ({"s": torch.zeros(4, 1).expand(4, 3)}, ValueError, "s must not be expanded"),
        ({"v": torch.zeros(4, 24)}, ValueError, r"v must have shape \[n, H, D\]"),
        ({"v_other": None}, TypeError, "v_other must be a torch.Tensor, got NoneType"),
    ],
)
def test_misuse_is_refused_before_anything_is_written(change, error, match):
    v, s = states(4, 3, 8)
    other_v, other_s = states(4, 3, 8)
    before_v, before_s = v.clone(), s.clone()
    with pytest.raises(error, match=match):
        merge_state_in_place(**{"v": v, "s": s, "v_other": other_v, "s_other": other_s} | change)
    assert torch.equal(v, before_v)
    assert torch.equal(s, before_s)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda v, s: merge_states(v, s), r"v must have shape \[n, num_states, H, D\]"),
        (lambda v, s: merge_states(v[None], s), r"s must have shape \[n, num_states, H\]"),
        (lambda v, s: merge_state(v, s, v, s[1:]), r"s_b must have shape \[n, H\]"),
        (lambda v, s: variable_length_merge_states(v, s, torch.tensor([0, 5])), "indptr must rise from 0 to at most 4"),
        (lambda v, s: variable_length_merge_states(v, s, torch.tensor([0, 3, 2])), "indptr must rise"),
        (lambda v, s: variable_length_merge_states(v, s, torch.tensor([1, 3])), "indptr must rise from 0"),
        (lambda v, s: variable_length_merge_states(v, s, torch.tensor([0.0, 1.0])), "indptr must have dtype int32"),
        (lambda v, s: variable_length_merge_states(v, s, torch.zeros(0).int()), r"indptr must have shape \[n \+ 1\]"),
    ],
)
def test_shapes_are_checked(call, match):
    with pytest.raises(ValueError, match=match):
        call(*states(4, 3, 8))
