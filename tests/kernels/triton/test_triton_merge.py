"""merge_states on the Triton back end: what the conformance cases do not reach by themselves."""

import math

import pytest
import torch

import pagedkv
from pagedkv.kernels.triton import merge_states
from pagedkv.kernels.triton.runtime import IS_INTERPRETED
from pagedkv.testing.numeric import assert_close_to_oracle, merge_oracle

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(params=[None, 1024], ids=["as-launched", "blocks-of-a-gpu"])
def block(request, monkeypatch):
    """Interpreted blocks are larger than those of a GPU."""
    if request.param is not None:
        monkeypatch.setattr(merge_states, "_BLOCK", request.param)


def states(num_tokens, num_states, num_heads=3, dim=40, dtype=torch.float32):
    values = torch.randn(num_tokens, num_states, num_heads, dim).to(dtype)
    return values, torch.randn(num_tokens, num_states, num_heads) * 3


def run(values, lse):
    state = pagedkv.merge_states(values.to(DEVICE), lse.to(DEVICE), backend="triton")
    return type(state)(*(part.cpu() for part in state))


def assert_merged(values, lse):
    state, exact, plain = run(values, lse), merge_oracle(values, lse), merge_oracle(values, lse, torch.float32)
    assert_close_to_oracle("out", state.out, exact.out, plain.out)
    assert_close_to_oracle("lse", state.lse, exact.lse, plain.lse)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens, num_states, num_heads, dim", [(1, 1, 1, 1), (7, 3, 5, 128), (3, 2, 2, 1500)])
def test_rows_of_any_width_and_number(num_tokens, num_states, num_heads, dim, dtype):
    assert_merged(*states(num_tokens, num_states, num_heads, dim, dtype))


@pytest.mark.usefixtures("block")
def test_one_state_comes_back_bit_by_bit():
    values, lse = states(9, 1, dim=64)
    state = run(values, lse)
    assert torch.equal(state.out, values[:, 0])
    assert torch.equal(state.lse, lse[:, 0])


def test_rows_without_columns_have_an_lse():
    values, lse = states(4, 3, dim=0)
    state = run(values, lse)
    assert state.out.shape == (4, 3, 0)
    torch.testing.assert_close(state.lse, torch.logsumexp(lse, 1))


@pytest.mark.usefixtures("block")
def test_nan_and_infinite_values_show_where_they_are_and_nowhere_else():
    values, lse = states(6, 4, dim=200)
    values[1, 2, 1, 7], values[2, 0, 0, 199], lse[3, 1, 2] = math.nan, math.inf, math.nan
    state = run(values, lse)
    wrong = torch.zeros_like(state.out, dtype=torch.bool)
    wrong[1, 1, 7] = wrong[2, 0, 199] = True
    wrong[3, 2] = True
    assert torch.equal(~state.out.isfinite(), wrong)
    assert state.out[2, 0, 199] == math.inf
    assert state.lse[3, 2].isnan()
    assert state.lse.isfinite().sum() == state.lse.numel() - 1


def test_states_before_the_first_that_saw_a_key():
    values, lse = states(5, 6)
    lse[:, :4], values[:, :4] = -math.inf, math.nan
    state = run(values, lse)
    expected = run(values[:, 4:], lse[:, 4:])
    assert torch.equal(state.out, expected.out)
    assert torch.equal(state.lse, expected.lse)
