import functools

import pytest
import torch
from batches import DTYPES, LSE_TOLERANCES, Batch, assert_near
from oracle import attend

from pagedkv.integrations.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
    single_decode_with_kv_cache,
)
from pagedkv.integrations.flashinfer.utils import get_alibi_slopes

WORKSPACE = torch.empty(1 << 10, dtype=torch.int8)
KV_LENS = [17, 40, 1, 0, 300]


def one_row_each(kv_lens=KV_LENS, rows=1, **kwargs):
    return Batch([rows] * len(kv_lens), kv_lens, **kwargs)


def planned(batch, *, use_tensor_cores=False, **options):
    wrapper = BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, batch.layout, use_tensor_cores=use_tensor_cores)
    sizes = (batch.num_q_heads, batch.num_kv_heads, batch.head_dim, batch.page_size)
    wrapper.plan(*batch.table, *sizes, q_data_type=batch.dtype, **options)
    return wrapper


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 8, 16])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_decode_is_attention_of_each_sequence(dtype, layout, page_size, group):
    batch = one_row_each(page_size=page_size, dtype=dtype, layout=layout, group=group)
    wrapper = planned(batch)
    expected = batch.expected()
    assert bool((expected[1][3] == -torch.inf).all())
    assert not bool(expected[0][3].any())
    for cache in (batch.pair, batch.combined):
        batch.assert_close(wrapper.run(batch.q, cache, return_lse=True), expected)
    assert torch.equal(wrapper.run(batch.q, batch.pair), wrapper.run_return_lse(batch.q, batch.pair)[0])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{"window_left": 4}, {"logits_soft_cap": 3.0}, {"sm_scale": 0.3}])
def test_options_of_a_plan(index_dtype, options):
    batch = one_row_each(index_dtype=index_dtype)
    renamed = {("soft_cap" if name == "logits_soft_cap" else name): value for name, value in options.items()}
    result = planned(batch, **options).run(batch.q, batch.pair, return_lse=True)
    batch.assert_close(result, batch.expected(**renamed))


def test_positions():
    batch = one_row_each([17, 40, 1], dtype=torch.float32)
    result = planned(batch, pos_encoding_mode="ALIBI").run(batch.q, batch.pair, return_lse=True)
    batch.assert_close(result, batch.expected(slopes=get_alibi_slopes(4)))
    result = planned(batch, pos_encoding_mode="ROPE_LLAMA").run(batch.q, batch.pair)
    torch.testing.assert_close(result.double(), batch.expected(rope={})[0], rtol=1e-5, atol=1e-5)


def test_no_sequence_at_all():
    batch = Batch([], [])
    out, lse = planned(batch).run(batch.q, batch.pair, return_lse=True)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_several_rows_a_sequence_are_causal_among_themselves():
    batch = one_row_each([17, 40, 3], rows=3)
    wrapper = planned(batch, use_tensor_cores=True, q_len_per_req=3)
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), batch.expected(causal=True))
    wrapper.run(batch.q, batch.pair, q_len_per_req=3)
    with pytest.raises(ValueError, match="q_len_per_req must be 3"):
        wrapper.run(batch.q, batch.pair, q_len_per_req=2)
    with pytest.raises(ValueError, match="needs use_tensor_cores=True"):
        planned(batch, q_len_per_req=3)
    short = one_row_each([17, 2], rows=3)
    with pytest.raises(ValueError, match="at least q_len_per_req = 3 tokens, got 2"):
        planned(short, use_tensor_cores=True, q_len_per_req=3)
    with pytest.raises(ValueError, match="fixed_split_size needs use_tensor_cores=True"):
        planned(batch, fixed_split_size=4)


def test_options_by_position_are_deprecated():
    batch = one_row_each()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    with pytest.warns(DeprecationWarning, match="name pos_encoding_mode, window_left"):
        wrapper.begin_forward(*batch.table, 4, 2, 64, 16, "NONE", 5)
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), batch.expected(window_left=5))
    with pytest.raises(TypeError, match="multiple values for argument 'pos_encoding_mode'"):
        wrapper.plan(*batch.table, 4, 2, 64, 16, "NONE", pos_encoding_mode="NONE")
    with pytest.raises(TypeError, match="unexpected keyword argument 'soft_cap'"):
        wrapper.plan(*batch.table, 4, 2, 64, 16, soft_cap=1.0)
    with pytest.raises(TypeError, match="at most 16 options"):
        wrapper.plan(*batch.table, 4, 2, 64, 16, *range(17))


def test_the_older_name_of_the_dtype_of_pages():
    batch = one_row_each()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(WORKSPACE)
    wrapper.plan(*batch.table, 4, 2, 64, 16, data_type="float8_e5m2")
    assert (wrapper.batch.q_dtype, wrapper.batch.kv_dtype) == (torch.float16, torch.float8_e5m2)


def test_forward_takes_the_place_of_what_was_planned():
    batch = one_row_each()
    wrapper = planned(batch, window_left=3, logits_soft_cap=2.0)
    batch.assert_close(wrapper.forward_return_lse(batch.q, batch.pair), batch.expected())
    result = wrapper.forward(batch.q, batch.pair, sm_scale=0.2, window_left=4, v_scale=2.0)
    assert_near(result, 2 * batch.expected(sm_scale=0.2, window_left=4)[0], batch.dtype)


def test_sinks_and_windows_of_a_run():
    batch = one_row_each()
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    wrapper = planned(batch, window_left=6)
    result = wrapper.run(batch.q, batch.pair, sinks=sinks, window_left=6, return_lse=True)
    batch.assert_close(result, batch.expected(window_left=6, sinks=sinks))
    with pytest.raises(AssertionError, match="window_left must be 6"):
        wrapper.run(batch.q, batch.pair, window_left=-1)
    with pytest.raises(NotImplementedError, match="kv_cache_sf is not supported"):
        wrapper.run(batch.q, batch.pair, kv_cache_sf=torch.zeros(1))


def test_graph_mode_and_the_faster_plan():
    batch = one_row_each([20, 33])
    buffers = [torch.zeros(size, dtype=torch.int32) for size in (3, 12, 2)]
    wrapper = CUDAGraphBatchDecodeWithPagedKVCacheWrapper(WORKSPACE, *buffers)
    assert wrapper.is_cuda_graph_enabled
    assert not wrapper.use_tensor_cores
    fast = functools.partial(fast_decode_plan, wrapper)
    with pytest.raises(RuntimeError, match="plan must be called"):
        fast(*batch.table, 4, 2, 64, 16)
    wrapper.plan(*batch.table, 4, 2, 64, 16)
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), batch.expected())
    assert buffers[0].tolist() == [0, 2, 5]
    assert buffers[2].tolist() == [4, 1]
    longer = one_row_each([21, 34], seed=3)
    fast(*longer.table, 4, 2, 64, 16, global_override_indptr_cpu=longer.kv_indptr)
    longer.assert_close(wrapper.run(longer.q, longer.pair, return_lse=True), longer.expected())
    assert buffers[2].tolist() == [5, 2]
    # As engines install it, in the place of plan.
    wrapper.plan = fast
    wrapper.plan(*batch.table, 4, 2, 64, 16)
    planned_batch = wrapper.batch
    wrapper.workspace_size(*longer.table, 4, 2, 64, 16)
    assert wrapper.batch is planned_batch
    batch.assert_close(wrapper.run(batch.q, batch.pair, return_lse=True), batch.expected())
    three = one_row_each([20, 33, 4])
    with pytest.raises(ValueError, match="indptr must have exactly the 3 entries"):
        wrapper.plan(*three.table, 4, 2, 64, 16)
    with pytest.raises(ValueError, match="indices must have at most the 12 entries"):
        wrapper.plan(torch.tensor([0, 2, 14]), torch.arange(14), torch.tensor([1, 1]), 4, 2, 64, 16)
    with pytest.raises(ValueError, match="paged_kv_indices_buffer must be a tensor"):
        BatchDecodeWithPagedKVCacheWrapper(WORKSPACE, use_cuda_graph=True, paged_kv_indptr_buffer=buffers[0])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_len", [0, 1, 97])
@pytest.mark.parametrize("options", [{}, {"window_left": 9}, {"logits_soft_cap": 4.0}, {"sm_scale": 0.4}])
def test_one_sequence(layout, kv_len, options):
    q = torch.randn(6, 64).half()
    k, v = torch.randn(2, kv_len, 2, 64).half()
    given = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    renamed = {("soft_cap" if name == "logits_soft_cap" else name): value for name, value in options.items()}
    out, lse = single_decode_with_kv_cache(q, *given, kv_layout=layout, return_lse=True, **options)
    expected = attend(q[None], k, v, **renamed)
    assert_near(out, expected[0][0], torch.float16)
    torch.testing.assert_close(lse.double(), expected[1][0].double(), **LSE_TOLERANCES)


def test_one_sequence_with_positions_and_scales():
    q, (k, v) = torch.randn(4, 64), torch.randn(2, 33, 4, 64)
    slopes = get_alibi_slopes(4)
    out = single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ALIBI")
    assert_near(out, attend(q[None], k, v, slopes=slopes)[0][0], torch.float32)
    out = single_decode_with_kv_cache(q, k, v, q_scale=2.0, k_scale=torch.tensor(0.5), v_scale=3.0, sm_scale=0.1)
    assert_near(out / 3, attend(q[None], k, v, sm_scale=0.1)[0][0], torch.float32)
    with pytest.raises(ValueError, match=r"q must have shape \[Hq, D\]"):
        single_decode_with_kv_cache(q[None], k, v)


def test_a_run_under_torch_compile():
    batch = one_row_each()
    wrapper = planned(batch)
    expected = wrapper.run(batch.q, batch.pair, return_lse=True)
    compiled = torch.compile(lambda q, cache: wrapper.run(q * 1, cache, return_lse=True), backend="eager")
    result = compiled(batch.q, batch.pair)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
