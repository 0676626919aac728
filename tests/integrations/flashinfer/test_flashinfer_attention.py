import functools
from unittest.mock import patch

import pytest
import torch
from batches import DTYPES, Batch
from oracle import attend

from pagedkv.integrations.flashinfer.attention import BatchAttention, BatchAttentionWithAttentionSinkWrapper
from pagedkv.integrations.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from pagedkv.testing.numeric import assert_close_to_oracle

WORKSPACE = torch.empty(1 << 10, dtype=torch.uint8)
Q_LENS, KV_LENS = [3, 1, 0, 7, 5, 0], [17, 40, 9, 5, 0, 0]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])


def assert_close(result, expected, of_out=1.0, dtype=torch.float16):
    """result against `expected()` times of_out, in float64 and in float32 arithmetic."""
    assert result[0].dtype == dtype
    assert result[1].dtype == torch.float32
    exact = expected()
    with patch.object(torch.Tensor, "double", torch.Tensor.float):
        plain = expected()
    assert_close_to_oracle("out", result[0], exact[0] * of_out, plain[0] * of_out)
    assert_close_to_oracle("lse", result[1], exact[1], plain[1])


def plan(wrapper, batch, *, arrays=None, **options):
    named = {"q_data_type": batch.dtype, "kv_data_type": batch.dtype, **options}
    kv_lens = torch.tensor(batch.kv_lens, dtype=batch.kv_indptr.dtype)
    arrays = arrays or (batch.qo_indptr, batch.kv_indptr, batch.kv_indices, kv_lens)
    heads = batch.num_q_heads, batch.num_kv_heads, batch.head_dim, batch.value_dim
    wrapper.plan(*arrays, *heads, batch.page_size, **named)
    return wrapper


def planned(batch, **options):
    return plan(BatchAttention(batch.layout, "cpu"), batch, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_batch_attention_is_attention_of_each_sequence(dtype, layout, page_size, causal):
    batch = Batch(Q_LENS, KV_LENS, page_size=page_size, dtype=dtype, layout=layout)
    wrapper = planned(batch, causal=causal)
    for cache in (batch.pair, batch.combined):
        out, lse = wrapper.run(batch.q, cache)
        assert_close((out, lse), functools.partial(batch.expected, causal=causal), dtype=dtype)
        # The sequence without tokens.
        assert torch.isneginf(lse[11:]).all()
        assert not out[11:].any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [40, 256])
def test_groups_and_head_dims(index_dtype, group, head_dim):
    batch = Batch(Q_LENS, KV_LENS, group=group, head_dim=head_dim, index_dtype=index_dtype)
    assert_close(
        planned(batch, sm_scale=0.02).run(batch.q, batch.pair), functools.partial(batch.expected, sm_scale=0.02)
    )


def test_values_may_be_narrower_than_keys():
    batch = Batch(Q_LENS, KV_LENS, head_dim=192, value_dim=128)
    assert_close(planned(batch, causal=True).run(batch.q, batch.pair), functools.partial(batch.expected, causal=True))


def test_bfloat16_is_what_plan_takes_by_default():
    batch = Batch(Q_LENS, KV_LENS, dtype=torch.bfloat16)
    wrapper = BatchAttention(device="cpu")
    kv_lens = torch.tensor(KV_LENS, dtype=torch.int32)
    wrapper.plan(batch.qo_indptr, batch.kv_indptr, batch.kv_indices, kv_lens, 4, 2, 64, 64, 16)
    assert_close(wrapper.run(batch.q, batch.pair), batch.expected, dtype=torch.bfloat16)


def test_pages_of_one_token_need_no_dimension_for_it():
    batch = Batch(Q_LENS, KV_LENS, page_size=1)
    wrapper = planned(batch)
    expected = wrapper.run(batch.q, batch.pair)
    short = (batch.key_pages.squeeze(1), batch.value_pages.squeeze(1))
    for cache in (short, torch.stack(short, dim=1)):
        assert all(map(torch.equal, wrapper.run(batch.q, cache), expected))


def test_shared_and_repeated_pages():
    batch = Batch([4], [32], page_size=8)
    a, b, c, d = batch.kv_indices[:4].tolist()
    rows, kv_lens, q_lens = [[a, b, c, d], [a, b, a], [d, d]], [32, 21, 16], [2, 1, 1]
    arrays = [torch.tensor(array) for array in ([0, 2, 3, 4], [0, 4, 7, 9], [*rows[0], *rows[1], *rows[2]], kv_lens)]
    result = planned(batch, arrays=arrays, causal=True).run(batch.q, batch.pair)

    def expected():
        states = []
        for q, row, kv_len in zip(batch.q.split(q_lens), rows, kv_lens, strict=True):
            keys, values = (pages[row].flatten(0, 1)[:kv_len] for pages in batch.pair)
            states.append(attend(q, keys, values, causal=True))
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    assert_close(result, expected)


def test_pages_beyond_the_length_are_ignored():
    batch = Batch([2, 1], [16, 3], page_size=16)
    first, second = batch.kv_indices[:2].tolist()
    indices = torch.tensor([first, 1 << 20, 1 << 20, second, 1 << 20])
    arrays = (batch.qo_indptr, torch.tensor([0, 3, 5]), indices, torch.tensor([16, 3]))
    assert_close(planned(batch, arrays=arrays).run(batch.q, batch.pair), batch.expected)


def test_an_empty_batch():
    batch = Batch([], [])
    out, lse = planned(batch).run(batch.q, batch.pair)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))


@pytest.mark.parametrize("factor", [float, torch.tensor, lambda x: torch.tensor([x])])
def test_scales_are_numbers_or_tensors_of_one_element(factor):
    batch = Batch(Q_LENS, KV_LENS)
    result = planned(batch).run(batch.q, batch.pair, k_scale=factor(0.5), v_scale=factor(0.7))
    assert_close(result, functools.partial(batch.expected, sm_scale=0.5 / 8), of_out=0.7)


def test_a_soft_cap_is_the_plans_or_that_of_the_run():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch, logits_soft_cap=3.0)
    for cap in (0.0, 3.0):
        assert_close(
            wrapper.run(batch.q, batch.pair, logits_soft_cap=cap), functools.partial(batch.expected, soft_cap=3.0)
        )
    assert_close(wrapper.run(batch.q, batch.pair, logits_soft_cap=1.5), functools.partial(batch.expected, soft_cap=1.5))
    for plans in (None, 0.0, -1.0):
        wrapper = planned(batch, logits_soft_cap=plans)
        assert_close(wrapper.run(batch.q, batch.pair), batch.expected)
        with pytest.raises(ValueError, match=r"logits_soft_cap must be 0, for plan was given none, got 3.0"):
            wrapper.run(batch.q, batch.pair, logits_soft_cap=3.0)


@pytest.mark.parametrize("has_gaps", [False, True])
def test_buffers_are_written_in_place(has_gaps):
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    expected = wrapper.run(batch.q, batch.pair)
    if has_gaps:
        out, lse = torch.empty(16, 4, 70, dtype=batch.dtype)[..., :64], torch.empty(16, 7)[:, :4]
    else:
        out, lse = torch.empty_like(expected[0]), torch.empty_like(expected[1])
    result = wrapper.run(batch.q, batch.pair, out, lse)
    assert result[0] is out
    assert result[1] is lse
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_what_run_refuses():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = planned(batch)
    with pytest.raises(ValueError, match="q must have dtype float16"):
        wrapper.run(batch.q.float(), batch.pair)
    with pytest.raises(ValueError, match="keys and values must have dtype float16"):
        wrapper.run(batch.q, batch.combined.bfloat16())
    with pytest.raises(ValueError, match="q must have 16 rows"):
        wrapper.run(batch.q[1:], batch.pair)
    with pytest.raises(ValueError, match=r"out must have shape \[16, 4, 64\], got \[16, 4, 63\]"):
        wrapper.run(batch.q, batch.pair, out=batch.q[..., 1:])
    with pytest.raises(ValueError, match="lse must have dtype float32, got float16"):
        wrapper.run(batch.q, batch.pair, lse=torch.empty(16, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="k_scale must have 1 or 2 elements"):
        wrapper.run(batch.q, batch.pair, k_scale=torch.ones(3))
    with pytest.raises(NotImplementedError, match="kv_cache_sf is not supported"):
        wrapper.run(batch.q, batch.pair, kv_cache_sf=batch.pair)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        BatchAttention(device="cpu").run(batch.q, batch.pair)


def test_what_plan_refuses():
    batch = Batch(Q_LENS, KV_LENS)
    with pytest.raises(KeyError, match="kv_layout must be NHD or HND"):
        BatchAttention("NDH", "cpu")
    with pytest.raises(ValueError, match="head_dim_qk must be at most 256, got 320"):
        planned(Batch([1], [1], head_dim=320))
    with pytest.raises(ValueError, match="head_dim_vo must be at most 256, got 257"):
        planned(Batch([1], [1], value_dim=257))
    with pytest.raises(NotImplementedError, match="use_profiler is not supported"):
        planned(batch, use_profiler=True)
    arrays = (batch.qo_indptr, batch.kv_indptr, batch.kv_indices, torch.tensor([17, 49, 9, 5, 0, 0]))
    with pytest.raises(ValueError, match="of sequence 1 must be between 0 and 48"):
        planned(batch, arrays=arrays)


def test_without_a_gpu_the_default_device_is_that_of_the_index_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = plan(BatchAttention(), batch)
    assert_close(wrapper.run(batch.q, batch.pair), batch.expected)


def with_sinks(batch, *args, wrapper_options=None, **options):
    wrapper = BatchAttentionWithAttentionSinkWrapper(WORKSPACE, batch.layout, *args, **(wrapper_options or {}))
    wrapper.plan(
        batch.qo_indptr,
        *batch.table,
        batch.num_q_heads,
        batch.num_kv_heads,
        batch.head_dim,
        batch.page_size,
        q_data_type=batch.dtype,
        kv_data_type=batch.dtype,
        **options,
    )
    return wrapper


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_left": 3}])
def test_a_sink_joins_the_denominator(dtype, layout, page_size, options):
    batch = Batch(Q_LENS, KV_LENS, page_size=page_size, dtype=dtype, layout=layout)
    wrapper = with_sinks(batch, **options)
    expected = functools.partial(batch.expected, sinks=SINKS, sm_scale=0.3, **options)
    for cache in (batch.pair, batch.combined):
        assert_close(wrapper.run(batch.q, cache, SINKS, 0.3, return_lse=True), expected, dtype=dtype)
    assert_close(wrapper.run_return_lse(batch.q, batch.pair, SINKS, 0.3), expected, dtype=dtype)
    # A row that sees no key has its sink alone.
    assert torch.equal(wrapper.run(batch.q, batch.pair, SINKS, 0.3)[11:], torch.zeros(5, 4, 64, dtype=dtype))


def test_a_sink_by_name_leaves_the_scale_of_the_plan():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = with_sinks(batch, sm_scale=0.2)
    expected = functools.partial(batch.expected, sinks=SINKS, sm_scale=0.2)
    assert_close(wrapper.run(batch.q, batch.pair, sinks=SINKS, return_lse=True), expected)


def test_scales_and_buffers_with_a_sink():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = with_sinks(batch)
    out, lse = torch.empty_like(batch.q), torch.empty(16, 4)
    result = wrapper.run(
        batch.q, batch.pair, SINKS, 0.3, q_scale=0.5, k_scale=1.5, v_scale=0.7, out=out, lse=lse, return_lse=True
    )
    assert result[0] is out
    assert result[1] is lse
    expected = functools.partial(batch.expected, sinks=SINKS, sm_scale=0.3 * 0.75)
    assert_close(result, expected, of_out=0.7)


def test_only_the_plan_decides_what_its_constructor_was_told():
    batch = Batch(Q_LENS, KV_LENS)
    hints = {"window_left": 2, "q_data_type": torch.bfloat16, "head_dim_qk": 128, "use_fp16_qk_reduction": True}
    wrapper = with_sinks(batch, wrapper_options={**hints, "backend": "fa2", "pos_encoding_mode": "NONE"})
    expected = functools.partial(batch.expected, sinks=SINKS, sm_scale=0.3)
    assert_close(wrapper.run(batch.q, batch.pair, SINKS, 0.3, return_lse=True), expected)


def test_graph_mode_with_sinks_keeps_its_buffers_filled():
    batch = Batch(Q_LENS, KV_LENS)
    buffers = [torch.full((n,), -1, dtype=torch.int32) for n in (7, 7, 20, 6)]
    wrapper = with_sinks(batch, True, *buffers)
    assert isinstance(wrapper, BatchPrefillWithPagedKVCacheWrapper)
    for buffer, array in zip(buffers, (batch.qo_indptr, *batch.table), strict=True):
        assert buffer[: len(array)].tolist() == array.tolist()
    expected = functools.partial(batch.expected, sinks=SINKS, sm_scale=0.3)
    assert_close(wrapper.run(batch.q, batch.pair, SINKS, 0.3, return_lse=True), expected)
    with pytest.raises(ValueError, match="paged_kv_indices_buf must be a tensor in CUDA graph mode"):
        with_sinks(batch, True, *buffers[:2], None, buffers[3])


def test_what_the_sink_wrapper_refuses():
    batch = Batch(Q_LENS, KV_LENS)
    wrapper = with_sinks(batch)
    run = functools.partial(wrapper.run, batch.q, batch.pair)
    for attempt in (run, functools.partial(run, return_lse=True), functools.partial(run, sinks=None)):
        with pytest.raises(TypeError, match="run must have a sink tensor and sm_scale after the caches, got neither"):
            attempt()
    with pytest.raises(TypeError, match="run must have a sink tensor and sm_scale by position"):
        run(SINKS)
    with pytest.raises(ValueError, match="sinks must have shape"):
        run(SINKS[:3], 0.3)
    with pytest.raises(TypeError, match="sinks must have dtype float32, got float16"):
        run(SINKS.half(), 0.3)
    with pytest.raises(KeyError, match="pos_encoding_mode must be one of"):
        BatchAttentionWithAttentionSinkWrapper(WORKSPACE, pos_encoding_mode="ROPE")
    with pytest.raises(ValueError, match="backend must be one of"):
        BatchAttentionWithAttentionSinkWrapper(WORKSPACE, backend="trtllm-gen")
    with pytest.raises(KeyError, match="kv_layout must be NHD or HND"):
        BatchAttentionWithAttentionSinkWrapper(WORKSPACE, "NDH")
