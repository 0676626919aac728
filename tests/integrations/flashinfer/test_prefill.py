import numpy as np
import pytest
import torch
from batches import DTYPES, LSE_TOLERANCES, Batch, assert_near
from oracle import attend

from pagedkv.integrations.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from pagedkv.integrations.flashinfer.utils import get_alibi_slopes

WORKSPACE = torch.empty(1 << 10, dtype=torch.uint8)
Q_LENS, KV_LENS = [3, 1, 0, 7, 5], [17, 40, 9, 7, 0]


def planned(batch, **options):
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, batch.layout)
    dims = {} if batch.value_dim == batch.head_dim else {"head_dim_vo": batch.value_dim}
    wrapper.plan(
        batch.qo_indptr,
        *batch.table,
        batch.num_q_heads,
        batch.num_kv_heads,
        batch.head_dim,
        batch.page_size,
        q_data_type=batch.dtype,
        **dims,
        **options,
    )
    return wrapper


def packed(masks):
    return torch.from_numpy(
        np.concatenate([np.packbits(mask.numpy().reshape(-1), bitorder="little") for mask in masks])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_paged_prefill_is_attention_of_each_sequence(dtype, layout, page_size, causal):
    batch = Batch(Q_LENS, KV_LENS, page_size=page_size, dtype=dtype, layout=layout)
    wrapper = planned(batch, causal=causal)
    for cache in (batch.pair, list(batch.pair), batch.combined):
        batch.assert_close(wrapper.run(batch.q, cache, return_lse=True), batch.expected(causal=causal))
    torch.testing.assert_close(wrapper.run(batch.q, batch.pair), wrapper.run_return_lse(batch.q, batch.pair)[0])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("options", [{"window_left": 4}, {"logits_soft_cap": 3.0}, {"sm_scale": 0.3}, {"causal": True}])
def test_options_of_a_plan(index_dtype, group, options):
    batch = Batch(Q_LENS, KV_LENS, group=group, head_dim=40, index_dtype=index_dtype)
    renamed = {("soft_cap" if name == "logits_soft_cap" else name): value for name, value in options.items()}
    result = planned(batch, **options).run(batch.q, batch.pair, return_lse=True)
    batch.assert_close(result, batch.expected(**renamed))


def test_pages_of_one_token_need_no_dimension_for_it():
    batch = Batch(Q_LENS, KV_LENS, page_size=1)
    wrapper = planned(batch, causal=True)
    expected = wrapper.run(batch.q, batch.pair)
    short = (batch.key_pages.squeeze(1), batch.value_pages.squeeze(1))
    assert torch.equal(wrapper.run(batch.q, short), expected)
    assert torch.equal(wrapper.run(batch.q, torch.stack(short, dim=1)), expected)


def test_values_may_be_narrower_than_keys():
    batch = Batch(Q_LENS, KV_LENS, head_dim=192, value_dim=128)
    batch.assert_close(
        planned(batch, causal=True).run(batch.q, batch.pair, return_lse=True), batch.expected(causal=True)
    )


@pytest.mark.parametrize("form", ["bool", "packed", "both"])
@pytest.mark.parametrize("window_left", [-1, 3])
def test_a_mask_takes_the_place_of_causal_and_keeps_the_window(form, window_left):
    batch = Batch(Q_LENS, KV_LENS)
    masks = batch.random_masks()
    given = {"custom_mask": torch.cat([mask.flatten() for mask in masks]), "packed_custom_mask": packed(masks)}
    if form != "both":
        given = {name: mask for name, mask in given.items() if name.startswith(form) == (form == "packed")}
    wrapper = planned(batch, causal=True, window_left=window_left, **given)
    expected = batch.expected(masks=masks, window_left=window_left)
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), expected)


@pytest.mark.parametrize("make", [BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper])
def test_a_plan_without_a_mask_forgets_the_mask_before(make):
    batch = Batch([3, 2], [16, 32])
    wrapper = make(WORKSPACE)
    ragged = make is BatchPrefillWithRaggedKVCacheWrapper
    table = (torch.tensor([0, 16, 48]),) if ragged else batch.table
    sizes = (4, 2, 64) if ragged else (4, 2, 64, 16)
    cache = (torch.cat(batch.keys), torch.cat(batch.values)) if ragged else (batch.pair,)
    mask = torch.cat([mask.flatten() for mask in batch.random_masks()])
    wrapper.plan(batch.qo_indptr, *table, *sizes, custom_mask=mask)
    wrapper.run(batch.q, *cache)
    wrapper.plan(batch.qo_indptr, *table, *sizes, causal=True)
    batch.assert_close(wrapper.run(batch.q, *cache, return_lse=True), batch.expected(causal=True))


@pytest.mark.parametrize("rope", [{}, {"theta": 1e5, "scale": 4.0}])
def test_rotation_by_the_kernel(rope):
    batch = Batch(Q_LENS, KV_LENS, dtype=torch.float32)
    given = {f"rope_{name}": value for name, value in rope.items()}
    result = planned(batch, causal=True, pos_encoding_mode="ROPE_LLAMA", **given).run(batch.q, batch.pair)
    expected, _ = batch.expected(causal=True, rope=rope)
    # Angles of float32 tables at positions below 64: a few rounding errors of a product of 64 columns.
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_alibi_counts_from_the_index_of_a_row():
    batch = Batch([3, 1, 5], [17, 40, 5], dtype=torch.float32, group=3)
    wrapper = planned(batch, causal=True, pos_encoding_mode="ALIBI")
    expected = batch.expected(causal=True, slopes=get_alibi_slopes(6))
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), expected)


def test_scales_are_numbers_or_tensors_and_only_those_of_keys_reach_the_lse():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    out, lse = batch.expected(sm_scale=0.125 * 0.5 * 3.0)
    for as_given in (float, torch.tensor, lambda number: torch.tensor([number])):
        scales = {"q_scale": as_given(0.5), "k_scale": as_given(3.0), "v_scale": as_given(2.0)}
        result = wrapper.run(batch.q, batch.pair, return_lse=True, **scales)
        batch.assert_close(result, (2 * out, lse))


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_pages_of_eight_bits(kv_dtype):
    batch = Batch(Q_LENS, KV_LENS)
    batch.keys = [key.to(kv_dtype).to(torch.float16) for key in batch.keys]
    batch.values = [value.to(kv_dtype).to(torch.float16) for value in batch.values]
    wrapper = planned(batch, causal=True, kv_data_type=kv_dtype)
    result = wrapper.run(batch.q, (batch.key_pages.to(kv_dtype), batch.value_pages.to(kv_dtype)), return_lse=True)
    batch.assert_close(result, batch.expected(causal=True))


def test_output_of_another_dtype():
    batch = Batch(Q_LENS, KV_LENS)
    result = planned(batch, o_data_type=torch.float32).run(batch.q, batch.pair)
    assert result.dtype == torch.float32
    assert_near(result, batch.expected()[0], torch.float32)


def test_results_are_written_into_what_is_given():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    expected = wrapper.run(batch.q, batch.pair, return_lse=True)
    out, lse = torch.full_like(batch.q, float("nan")), torch.full((16, 4), float("nan"))
    result = wrapper.run(batch.q, batch.pair, out=out, lse=lse, return_lse=True)
    assert result[0].data_ptr() == out.data_ptr()
    assert result[1].data_ptr() == lse.data_ptr()
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    with_gaps = torch.full((16, 8, 64), float("nan"), dtype=torch.float16)[:, ::2]
    wrapper.run(batch.q, batch.pair, out=with_gaps)
    assert torch.equal(with_gaps, out)


@pytest.mark.parametrize(
    ("buffers", "words"),
    [
        ({"out": torch.empty(16, 4, 32, dtype=torch.float16)}, "out must have shape"),
        ({"out": torch.empty(16, 4, 64)}, "out must have dtype float16, got float32"),
        ({"lse": torch.empty(16, 3)}, "lse must have shape"),
        ({"lse": torch.empty(16, 4, dtype=torch.float16)}, "lse must have dtype float32"),
    ],
)
def test_buffers_that_do_not_fit(buffers, words):
    batch = Batch(Q_LENS, KV_LENS)
    with pytest.raises(ValueError, match=words):
        planned(batch).run(batch.q, batch.pair, return_lse=True, **buffers)


def test_words_of_errors():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        wrapper.run(batch.q, batch.pair)
    with pytest.raises(KeyError, match="kv_layout must be NHD or HND, got 'NDH'"):
        BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, "NDH")
    with pytest.raises(ValueError, match="must be aligned to 16 bytes"):
        BatchPrefillWithPagedKVCacheWrapper(WORKSPACE[1:])
    with pytest.raises(ValueError, match="backend must be one of"):
        BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, backend="cudnn")
    with pytest.raises(KeyError, match="pos_encoding_mode must be one of"):
        planned(batch, pos_encoding_mode="ROPE")
    with pytest.raises(NotImplementedError, match="prefix_len_ptr is not supported"):
        planned(batch, prefix_len_ptr=torch.zeros(5))
    wrapper = planned(batch)
    with pytest.raises(ValueError, match="q must have dtype float16 .set by plan., got float32"):
        wrapper.run(batch.q.float(), batch.pair)
    with pytest.raises(ValueError, match="keys and values must have dtype float16"):
        wrapper.run(batch.q, (batch.key_pages.float(), batch.value_pages.float()))
    with pytest.raises(ValueError, match="q must have 16 rows"):
        wrapper.run(batch.q[:-1], batch.pair)
    with pytest.raises(AssertionError, match="window_left must be -1"):
        wrapper.run(batch.q, batch.pair, window_left=7)
    with pytest.raises(NotImplementedError, match="jit_args"):
        BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, jit_args=["name"])
    batch.last_page_len[0] = 17
    with pytest.raises(ValueError, match="last_page_len of sequence 0 must be in 1..16"):
        planned(batch)


def test_forward_takes_the_place_of_what_was_planned():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch, causal=True, window_left=3, logits_soft_cap=2.0)
    batch.assert_close(wrapper.forward_return_lse(batch.q, batch.pair), batch.expected())
    result = wrapper.forward(batch.q, batch.pair, causal=True, sm_scale=0.2, window_left=4)
    assert_near(result, batch.expected(causal=True, sm_scale=0.2, window_left=4)[0], batch.dtype)
    assert torch.equal(wrapper.run(batch.q, batch.pair), result)
    with pytest.raises(ValueError, match="q must have dtype"):
        wrapper.forward(batch.q.float(), batch.pair, sm_scale=0.5)
    assert torch.equal(wrapper.run(batch.q, batch.pair), result)
    assert wrapper.end_forward() is None


def test_sinks_join_the_denominator_in_both_forms():
    batch = Batch(Q_LENS, KV_LENS)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    wrapper = planned(batch, causal=True)
    expected = batch.expected(causal=True, sinks=sinks)
    batch.assert_close(wrapper.run(batch.q, batch.pair, sinks=sinks, return_lse=True), expected)
    jit_args = ["uri", *[torch.float16] * 3, torch.int32, 64, 64, ["sink"], ["float"], ["sm_scale"], ["double"]]
    variant = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, jit_args=[*jit_args, "AttentionSink", "struct ..."])
    variant.plan(batch.qo_indptr, *batch.table, 4, 2, 64, 16, causal=True)
    expected = batch.expected(causal=True, sinks=sinks, sm_scale=0.3)
    batch.assert_close(variant.run(batch.q, batch.pair, sinks, 0.3, return_lse=True), expected)
    with pytest.raises(TypeError, match="must have nothing by position"):
        wrapper.run(batch.q, batch.pair, sinks, 0.3)


def test_graph_mode_keeps_its_buffers_filled_and_its_batch_size():
    batch = Batch([2, 3], [20, 33])
    sizes = {"qo_indptr_buf": 3, "paged_kv_indptr_buf": 3, "paged_kv_indices_buf": 9, "paged_kv_last_page_len_buf": 2}
    buffers = {name: torch.full((size,), -1, dtype=torch.int32) for name, size in sizes.items()}
    with pytest.raises(ValueError, match="qo_indptr_buf must be a tensor in CUDA graph mode"):
        BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, use_cuda_graph=True)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE, use_cuda_graph=True, **buffers)
    assert wrapper.is_cuda_graph_enabled
    wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 64, 16, causal=True)
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), batch.expected(causal=True))
    assert buffers["qo_indptr_buf"].tolist() == [0, 2, 5]
    assert buffers["paged_kv_last_page_len_buf"].tolist() == [4, 1]
    other = Batch([2], [20])
    with pytest.raises(ValueError, match="qo_indptr must have exactly the 3 entries"):
        wrapper.plan(other.qo_indptr, *other.table, 4, 2, 64, 16)
    assert buffers["qo_indptr_buf"].tolist() == [0, 2, 5]
    mask = torch.cat([mask.flatten() for mask in batch.random_masks()])
    with pytest.raises(ValueError, match="custom_mask_buf must be given"):
        wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 64, 16, custom_mask=mask)


def test_workspace_size_plans_nothing():
    batch = Batch([1], [40_000], page_size=64, num_kv_heads=1, head_dim=8)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    sizes = wrapper.workspace_size(batch.qo_indptr, *batch.table, 2, 1, 8, 64)
    with pytest.raises(RuntimeError, match="plan must be called"):
        wrapper.run(batch.q, batch.pair)
    wrapper.plan(batch.qo_indptr, *batch.table, 2, 1, 8, 64)
    work = wrapper.batch.plan.work
    assert sizes == (wrapper.batch.plan.workspace_bytes, 0 if work is None else work.nbytes)
    wrapper.reset_workspace_buffer(torch.empty(64), torch.empty(64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="int_workspace_buffer must be aligned"):
        wrapper.reset_workspace_buffer(torch.empty(64), torch.empty(64, dtype=torch.uint8)[1:])


@pytest.mark.parametrize("kv_lens", [[17, 40, 9, 7, 0], [32, 64, 32, 16, 48]])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_keys_and_values(kv_lens, causal):
    batch = Batch([3, 1, 0, 7, 5], kv_lens, head_dim=96, value_dim=64)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    kv_indptr = torch.tensor([0, *kv_lens]).cumsum(0)
    wrapper.plan(batch.qo_indptr, kv_indptr, 4, 2, 96, 64, causal=causal)
    # Slices of one wider tensor, as a fused projection leaves them.
    wide = torch.cat([torch.cat(batch.keys), torch.cat(batch.values)], dim=-1)
    cache = wide[..., :96], wide[..., 96:]
    batch.assert_close(wrapper.run(batch.q, *cache, return_lse=True), batch.expected(causal=causal))
    with pytest.raises(ValueError, match="k must have shape"):
        wrapper.run(batch.q, cache[0][:-1], cache[1])
    expected, _ = batch.expected()
    assert_near(wrapper.forward(batch.q, *cache), expected, batch.dtype)


def test_query_of_eight_bits_gives_bfloat16_from_packed_keys():
    batch = Batch([3, 4], [9, 16])
    batch.q = batch.q.to(torch.float8_e4m3fn).to(torch.float16)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    wrapper.plan(
        batch.qo_indptr, torch.tensor([0, 9, 25]), 4, 2, 64, q_data_type="float8_e4m3fn", kv_data_type="float16"
    )
    result = wrapper.run(batch.q.to(torch.float8_e4m3fn), torch.cat(batch.keys), torch.cat(batch.values))
    assert result.dtype == torch.bfloat16
    assert_near(result, batch.expected()[0], torch.bfloat16)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(7, 33), (1, 1), (5, 2), (0, 4), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_one_sequence(layout, q_len, kv_len, causal):
    q = torch.randn(q_len, 4, 64).half()
    k, v = torch.randn(2, kv_len, 2, 64).half()
    given = (k, v) if layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))
    out, lse = single_prefill_with_kv_cache_return_lse(q, *given, causal=causal, kv_layout=layout)
    expected = attend(q, k, v, causal=causal)
    assert_near(out, expected[0], torch.float16)
    torch.testing.assert_close(lse.double(), expected[1], **LSE_TOLERANCES)
    assert torch.equal(out, single_prefill_with_kv_cache(q, *given, causal=causal, kv_layout=layout))


def test_one_sequence_with_a_mask_or_scales_a_head():
    q = torch.randn(5, 4, 64)
    k, v = torch.randn(2, 12, 2, 64)
    mask = torch.rand(5, 12) < 0.5
    for given in ({"custom_mask": mask}, {"packed_custom_mask": packed([mask])}):
        out = single_prefill_with_kv_cache(q, k, v, causal=True, **given)
        assert_near(out, attend(q, k, v, mask=mask)[0], torch.float32)
    scale_q, scale_k, scale_v = torch.rand(4) + 0.5, torch.rand(2) + 0.5, torch.rand(2) + 0.5
    out = single_prefill_with_kv_cache(q, k, v, scale_q, scale_k, scale_v, o_dtype=torch.bfloat16)
    expected, _ = attend(q * scale_q[:, None], k * scale_k[:, None], v * scale_v[:, None])
    assert out.dtype == torch.bfloat16
    assert_near(out, expected, torch.bfloat16)
    out = single_prefill_with_kv_cache(q, k, v, scale_k=scale_k, k_scale=3.0, scale_v=scale_v, v_scale=0.5)
    assert_near(out, attend(q, k * scale_k[:, None] * 3, v * scale_v[:, None] / 2)[0], torch.float32)
    with pytest.raises(ValueError, match="v must have the rows and heads of k"):
        single_prefill_with_kv_cache(q, k[:0], v)
    with pytest.raises(ValueError, match="scale must have 1 or 4 elements"):
        single_prefill_with_kv_cache(q, k, v, torch.rand(3))


def test_the_same_bits_in_every_batch():
    batch = Batch([40, 3, 1], [900, 77, 5])
    together = planned(batch, causal=True).run(batch.q, batch.pair)
    alone = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    count = int(batch.kv_indptr[1])
    alone.plan(
        batch.qo_indptr[:2],
        batch.kv_indptr[:2],
        batch.kv_indices[:count],
        batch.last_page_len[:1],
        4,
        2,
        64,
        16,
        causal=True,
        fixed_split_size=4,
        disable_split_kv=True,
    )
    assert torch.equal(alone.run(batch.q[:40], batch.pair), together[:40])


FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("by_name", [False, True])
def test_eight_bits_with_scales_of_each_head(by_name):
    batch = Batch(Q_LENS, [17, 40, 9, 8, 0], num_kv_heads=2, group=2)
    in_eight_bits = [x.to(FLOAT8) for x in (batch.q, batch.key_pages, batch.value_pages)]
    batch.q, batch.keys = batch.q.to(FLOAT8).half(), [key.to(FLOAT8).half() for key in batch.keys]
    batch.values = [value.to(FLOAT8).half() for value in batch.values]
    scales = torch.rand(4) + 0.5, torch.rand(2) + 0.5, torch.rand(2) + 0.5
    q, *pages = in_eight_bits
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(
        batch.qo_indptr, *batch.table, 4, 2, 64, 16, causal=True, q_data_type=FLOAT8, o_data_type=torch.float16
    )
    given = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True)) if by_name else {}
    result = wrapper.run(q, tuple(pages), *(() if by_name else scales), return_lse=True, **given)
    batch.q = batch.q.float() * scales[0][:, None]
    batch.keys = [key.float() * scales[1][:, None] for key in batch.keys]
    batch.values = [value.float() * scales[2][:, None] for value in batch.values]
    batch.assert_close(result, batch.expected(causal=True))
    ragged = BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE)
    kv_indptr = torch.tensor([0, *batch.kv_lens]).cumsum(0)
    ragged.plan(batch.qo_indptr, kv_indptr, 4, 2, 64, causal=True, q_data_type=FLOAT8, o_data_type=torch.float32)
    keys = torch.cat([key / scales[1][:, None] for key in batch.keys]).to(FLOAT8)
    values = torch.cat([value / scales[2][:, None] for value in batch.values]).to(FLOAT8)
    assert_near(ragged.run(q, keys, values, *scales), batch.expected(causal=True)[0], torch.float32)
    with pytest.raises(TypeError, match="the scales of q, k and v by position after the caches, got 2"):
        wrapper.run(q, tuple(pages), *scales[:2])


def test_an_lse_buffer_is_filled_without_return_lse():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    lse = torch.full((16, 4), float("nan"))
    out = wrapper.run(batch.q, batch.pair, lse=lse)
    batch.assert_close((out, lse), batch.expected())


def test_a_batch_cut_out_of_a_larger_one():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    start, _, _, end = batch.qo_indptr[1:5].tolist()
    cut = {"qo_indptr": batch.qo_indptr[1:5] - start, "paged_kv_indptr": batch.kv_indptr[1:5]}
    cut["paged_kv_last_page_len"] = batch.last_page_len[1:4]
    sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 64, "page_size": 16}
    wrapper.plan(paged_kv_indices=batch.kv_indices, **cut, **sizes)
    out, lse = batch.expected()
    batch.assert_close(wrapper.run(batch.q[start:end], batch.pair, return_lse=True), (out[start:end], lse[start:end]))
    with pytest.raises(ValueError, match="must hold indptr"):
        wrapper.plan(paged_kv_indices=batch.kv_indices[:3], **cut, **sizes)


def test_what_callers_do_with_their_tensors_after_a_plan_changes_nothing():
    batch = Batch(Q_LENS, KV_LENS)
    mask = torch.cat([mask.flatten() for mask in batch.random_masks()])
    wrapper = planned(batch, custom_mask=mask)
    expected = wrapper.run(batch.q, batch.pair)
    for tensor in (mask, batch.qo_indptr, *batch.table):
        tensor.zero_()
    assert torch.equal(wrapper.run(batch.q, batch.pair), expected)


def test_a_mask_to_be_added_is_refused():
    batch = Batch(Q_LENS, KV_LENS)
    mask = torch.cat([mask.flatten() for mask in batch.random_masks()])
    with pytest.raises(ValueError, match="custom_mask must have dtype bool or uint8, got float32"):
        planned(batch, custom_mask=mask.float())
    as_bytes = planned(batch, custom_mask=mask.to(torch.uint8)).run(batch.q, batch.pair)
    assert torch.equal(as_bytes, planned(batch, custom_mask=mask).run(batch.q, batch.pair))


@pytest.mark.parametrize("name", ["sm_scale", "logits_soft_cap"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        planned(Batch(Q_LENS, KV_LENS), **{name: value})


def test_results_lie_in_memory_of_their_own():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    flat, num = batch.key_pages.view(-1), batch.q.numel()
    before = flat.clone()
    for given in (
        {"out": flat[: 2 * num].view(16, 4, 64, 2)[..., 0]},
        {"out": flat[:num].view(16, 4, 64), "k_scale": torch.tensor([1.0, 2.0])},
    ):
        with pytest.raises(ValueError, match="out must not overlap keys"):
            wrapper.run(batch.q, batch.pair, **given)
    with pytest.raises(ValueError, match="lse must not overlap values"):
        wrapper.run(batch.q, batch.pair, lse=batch.value_pages.view(-1)[:128].view(torch.float32).view(16, 4))
    out = torch.zeros(16, 4, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="lse must not overlap out"):
        wrapper.run(batch.q, batch.pair, out=out, lse=out.view(-1)[:128].view(torch.float32).view(16, 4))
    with pytest.raises(ValueError, match="lse must not be expanded"):
        wrapper.run(batch.q, batch.pair, out=out, lse=torch.zeros(1, 4).expand(16, 4))
    assert torch.equal(flat.view(torch.int16), before.view(torch.int16))
    assert not out.any()


def test_natural_sums_by_head():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    _, lse = batch.expected()
    buffer = torch.full((16, 4), float("nan"))
    wrapper.run(batch.q, batch.pair, lse=buffer, lse_base="ln")
    torch.testing.assert_close(buffer.double(), lse * np.log(2), **LSE_TOLERANCES)
    _, by_head = wrapper.run(batch.q, batch.pair, return_lse=True, lse_layout="HN")
    torch.testing.assert_close(by_head.T.double(), lse, **LSE_TOLERANCES)
    with pytest.raises(ValueError, match="lse_base must be log2 or ln"):
        wrapper.run(batch.q, batch.pair, lse_base="log10")


@pytest.mark.parametrize("kv_lens", [[2, 4], [5, 2]])
def test_packed_keys_by_head(kv_lens):
    batch = Batch([2, 1], kv_lens)
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(WORKSPACE, "HND")
    wrapper.plan(batch.qo_indptr, torch.tensor([0, *kv_lens]).cumsum(0), 4, 2, 64, causal=True)
    cache = [torch.cat(xs).transpose(0, 1).contiguous() for xs in (batch.keys, batch.values)]
    batch.assert_close(wrapper.run(batch.q, *cache, return_lse=True), batch.expected(causal=True))
    with pytest.raises(ValueError, match=r"k must have shape \[Hk = 2, kv_indptr\[-1\]"):
        wrapper.run(batch.q, *(x.transpose(0, 1)[:, :, None][:, :1, 0] for x in cache))


def test_an_option_by_position_and_by_name():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(batch.qo_indptr, *batch.table, 4, 2, 64, 16, q_data_type=FLOAT8, o_data_type=torch.float32)
    q, *pages = (x.to(FLOAT8) for x in (batch.q, *batch.pair))
    with pytest.raises(TypeError, match="multiple values for argument 'k_scale'"):
        wrapper.run(q, tuple(pages), 1.0, 2.0, 3.0, k_scale=2.0)
