"""What only the Triton attention has: padded tables of items, cuts into chunks, tiles of each height, other targets."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch

import pagedkv
from pagedkv.kernels.attention_plan import DeviceWork
from pagedkv.testing.numeric import assert_attention_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from pagedkv.kernels.triton import attention_work, paged_attention_form
from pagedkv.kernels.triton import paged_attention as launcher
from pagedkv.kernels.triton.exp_table_kernel import exp_by_table


def batch(query_lens, seq_lens, *, dtype=torch.float32, heads=(2, 1), dim=16, page_size=16, **rules):
    """Query, pages of keys and of values, and plan; slots that no sequence owns are NaN."""
    counts = [-(-n // page_size) for n in seq_lens]
    ids = torch.randperm(sum(counts)).split(counts)
    table = pagedkv.PageTable.from_rows([part.tolist() for part in ids], seq_lens=seq_lens, page_size=page_size)
    pages = torch.full((2, sum(counts), page_size, heads[1], dim), math.nan)
    for row, length in zip(ids, seq_lens, strict=True):
        for token in range(length):
            pages[:, row[token // page_size], token % page_size] = torch.randn(2, heads[1], dim)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    plan = pagedkv.plan_attention(starts, table, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=dim, **rules)
    return torch.randn(sum(query_lens), heads[0], dim).to(dtype), *pages.to(dtype), plan


def attend(query, key_pages, value_pages, plan, **options):
    return pagedkv.paged_attention(query, key_pages, value_pages, plan, return_lse=True, backend="triton", **options)


def test_padding_items_and_merges_change_nothing():
    query, key_pages, value_pages, plan = batch([1, 2], [600, 40], heads=(8, 1))
    work = attention_work.work_of(plan)
    assert work.merges.shape[0] == 8, "the case must be cut into chunks"
    padding = torch.tensor([[-1, 7, 7, 7, 7]] * 3, dtype=torch.int32)
    no_merges = torch.tensor([[9, 9, 9, 9, 0]] * 3, dtype=torch.int32)
    few, some, many = (torch.cat([padding, items, padding]) for items in work[:3])
    padded = DeviceWork(few, some, many, torch.cat([work.merges, no_merges]), work.num_partial_rows + 5)
    tensors = query, key_pages, value_pages
    plain, in_buffers = attend(*tensors, plan), attend(*tensors, dataclasses.replace(plan, device_work=padded))
    assert torch.equal(plain.out, in_buffers.out)
    assert torch.equal(plain.lse, in_buffers.lse)


@pytest.mark.parametrize("chunk", [64, 1024])
def test_chunks_of_keys_give_the_same(monkeypatch, chunk):
    tensors = batch([1, 1, 3], [700, 20, 300], heads=(4, 2), page_size=4)
    sinks = torch.tensor([0.5, -math.inf, 3.0, 60.0])
    monkeypatch.setattr(attention_work, "_CHUNK", chunk)
    state = attend(*tensors, sinks=sinks)
    assert (attention_work.work_of(tensors[3]).merges.shape[0] > 0) == (chunk < 700)
    assert_attention_close(state, *tensors, sinks=sinks)


@pytest.mark.parametrize("query_len, heads", [(1, (40, 1)), (9, (2, 1)), (40, (2, 1)), (70, (3, 1))])
def test_tiles_of_each_height(query_len, heads):
    tensors = batch([query_len, 1], [query_len + 30, 5], dtype=torch.bfloat16, heads=heads, dim=32)
    assert_attention_close(attend(*tensors), *tensors)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_are_converted_right_on_every_target(monkeypatch, target, dtype):
    monkeypatch.setattr(launcher, "target_of", lambda device: target)
    query, key_pages, value_pages, plan = batch([1, 3], [20, 33], dtype=torch.bfloat16)
    pages = [(pages.float().nan_to_num() * 20).clamp(-120, 120).to(dtype) for pages in (key_pages, value_pages)]
    scales = torch.rand(2, *key_pages.shape[:1], 1, 16) * 0.1
    options = {"key_scales": scales[0], "value_scales": scales[1]}
    state = attend(query, *pages, plan, **options)
    assert_attention_close(state, query, *pages, plan, **options)


def test_scaled_queries_of_16_bits_lose_nothing_against_codes():
    """bfloat16 rows of any size meet codes as float16: a power of two a row keeps them exact."""
    query, key_pages, value_pages, plan = batch([1, 1, 1], [9, 9, 9], dtype=torch.bfloat16, dim=16)
    query = query * torch.tensor([1e-30, 1.0, 1e30])[:, None, None].to(torch.bfloat16)
    pages = [pages.float().nan_to_num().to(torch.float8_e5m2) for pages in (key_pages, value_pages)]
    for row, scale in enumerate((1e30, 1.0, 1e-30)):
        state = attend(query, *pages, plan, sm_scale=scale)
        exact = pagedkv.paged_attention(query, *pages, plan, sm_scale=scale, return_lse=True, backend="reference")
        torch.testing.assert_close(state.lse[row], exact.lse[row])
        torch.testing.assert_close(state.out[row], exact.out[row])


@pytest.mark.parametrize("sm_scale", [0.0, -0.3, 1e-20, 1e35])
def test_scales_that_are_not_plain(sm_scale):
    query, *pages, plan = batch([1, 2], [5, 20])
    query = query * (1e-35 if sm_scale > 1 else 1)
    assert_attention_close(attend(query, *pages, plan, sm_scale=sm_scale), query, *pages, plan, sm_scale=sm_scale)


@pytest.mark.parametrize("mark", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype, out_dtype", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_marks_in_values_reach_only_the_rows_that_see_them(dtype, out_dtype, mark):
    query, key_pages, value_pages, plan = batch([40], [90], dtype=dtype, page_size=90, window_left=30)
    clean = attend(query, key_pages, value_pages, plan, out_dtype=out_dtype).out
    value_pages[0, 70, 0, 3] = mark
    value_pages[0, 71, 0, 3] = mark
    marked = attend(query, key_pages, value_pages, plan, out_dtype=out_dtype).out
    positions = torch.arange(50, 90)
    sees = (positions >= 70) & (positions <= 71 + 30)
    shown = marked[sees][:, :, 3]
    assert shown.isnan().all() if math.isnan(mark) else (shown == mark).all()
    marked[sees, :, 3] = clean[sees, :, 3]
    assert torch.equal(marked, clean)


def test_both_infinities_make_nan():
    query, key_pages, value_pages, plan = batch([4], [4])
    value_pages[0, 0, 0, 0], value_pages[0, 2, 0, 0] = math.inf, -math.inf
    out = attend(query, key_pages, value_pages, plan).out[..., 0]
    assert (out[:2] == math.inf).all()
    assert out[2:].isnan().all()


def test_infinite_values_that_all_rows_see_stay_infinite_in_float32():
    """Weights are then the sum of several numbers, the lower ones of which are 0: 0 * inf must not follow."""
    query, key_pages, value_pages, plan = batch([1], [64], dtype=torch.bfloat16, page_size=64)
    value_pages[0, 7, 0, 2] = math.inf
    out = attend(query, key_pages, value_pages, plan, out_dtype=torch.float32).out
    assert (out[..., 2] == math.inf).all()
    assert out[..., [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("seq_len", [64, 57, 700], ids=["all-see-it", "edge", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.bfloat16, torch.float32])
def test_infinite_values_show_however_small_their_weight_is(dtype, seq_len):
    """e^-40 is 0 as float16, in which the product of these weights and values may be, and above 0 in float32."""
    query, key_pages, value_pages, plan = batch([1], [seq_len], page_size=64)
    key_pages[:], query[:] = 0.0, 1.0
    last = plan.page_indices[-1], (seq_len - 1) % 64, 0
    key_pages[last], value_pages[last] = -2.5, torch.tensor([0.0, math.inf, -math.inf, math.nan] * 4)
    arguments = (query, key_pages, value_pages) if dtype.itemsize == 4 else (query.half(), key_pages, value_pages)
    arguments = [arguments[0], *(pages.to(dtype) for pages in arguments[1:]), plan]
    for out_dtype in (torch.float32, torch.float16):
        options = {"sm_scale": 1.0, "out_dtype": out_dtype}
        state = attend(*arguments, **options)
        exact = pagedkv.paged_attention(*arguments, return_lse=True, backend="reference", **options)
        assert (exact.out[..., 1::4] == math.inf).all()
        torch.testing.assert_close(state.out, exact.out, equal_nan=True)
        torch.testing.assert_close(state.lse, exact.lse)


def test_a_nan_logit_shows_beside_infinite_values():
    query, key_pages, value_pages, plan = batch([2], [64], dtype=torch.float16, page_size=64)
    value_pages[0, 7, 0, 2] = math.inf
    key_pages[0, 63] = math.nan
    state = attend(query, key_pages, value_pages, plan)
    assert state.out[0][:, [0, 1, 3]].isfinite().all()
    assert (state.out[0, :, 2] == math.inf).all()
    assert state.out[1].isnan().all()
    assert state.lse[1].isnan().all()


@pytest.mark.parametrize("table", [pagedkv.ExpTable(), pagedkv.ExpTable(3, 1.0)], ids=["default", "coarse"])
@pytest.mark.parametrize("query_len", [1, 40, 70])
def test_weights_by_a_table_in_tiles_of_each_height_and_in_chunks(table, query_len):
    tensors = batch([query_len, 1], [query_len + 30, 700], dtype=torch.bfloat16, heads=(4, 2), dim=32)
    options = {"softmax": table, "sm_scale": 2.0, "sinks": torch.tensor([0.5, -math.inf, 3.0, 60.0])}
    assert attention_work.work_of(tensors[3]).merges.shape[0] > 0, "the case must be cut into chunks"
    assert_attention_close(attend(*tensors, **options), *tensors, **options)


class TableForm(NamedTuple):
    table_steps: int
    steps_per_unit: float


@triton.jit
def exponentials(X, Out, Entries, Powers, FORM: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(Out + at, exp_by_table(tl.load(X + at), Entries, Powers, FORM))


@pytest.mark.parametrize("table", [pagedkv.ExpTable(), pagedkv.ExpTable(2, 104.0), pagedkv.ExpTable(5, 2.0**-10)])
def test_the_table_reads_as_exp_table_exp(table):
    """Numbers above 0 too: where a GPU fuses a product with the subtraction, large logits leave some."""
    ends = [0.0, -0.0, 1e-3, 4e8, math.inf, -103.9999, -104.0, -104.00001, -1e30, -math.inf, math.nan]
    points = torch.linspace(-103, 0, 1024 - len(ends))
    x = torch.cat([torch.tensor(ends), points])
    out = torch.empty_like(x)
    form = TableForm(table.num_steps, table.num_steps / table.max_distance)
    exponentials[(1,)](x, out, *table.tensors(), FORM=form, SIZE=1024)
    torch.testing.assert_close(out, table.exp(x), rtol=table.max_relative_error, atol=0.0, equal_nan=True)
    assert out[: len(ends) - 1][2:5].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(out == 0, table.exp(x) == 0)


def test_rows_of_no_key_in_a_custom_mask_and_in_a_batch_of_no_tokens():
    mask = torch.zeros(3 * 20, dtype=torch.bool)
    mask[20:40] = True
    tensors = batch([3], [20], custom_mask=mask, causal=False)
    state = attend(*tensors)
    assert (state.out[[0, 2]] == 0).all()
    assert (state.lse[[0, 2]] == -math.inf).all()
    assert_attention_close(state, *tensors)
    empty = batch([0, 0], [4, 0])
    assert attend(*empty).out.shape == (0, 2, 16)


def test_every_element_that_is_not_aligned():
    """Views whose rows begin at odd elements: no access may be wider than one of them."""
    query, key_pages, value_pages, plan = batch([2], [30], dtype=torch.float16, page_size=5)
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:17] for x in (query, key_pages, value_pages)]
    assert_attention_close(attend(*odd, plan), query, key_pages, value_pages, plan)


def test_every_variant_names_all_parameters():
    for variant in paged_attention_form.compile_variants():
        assert {*variant.signature, *variant.constexprs} == {*variant.kernel.arg_names}, variant.name
        assert len(variant.left_out) == 3
