import pytest
import torch
from batches import DTYPES, LSE_TOLERANCES, Batch
from oracle import attend

from pagedkv.integrations.flashinfer.pod import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper
from pagedkv.integrations.flashinfer.quantization import packbits, segment_packbits
from pagedkv.integrations.flashinfer.utils import get_alibi_slopes

WORKSPACE = torch.empty(1 << 10, dtype=torch.uint8)
KV_LENS = [17, 0, 40, 1, 32]
DIM = 64


def assert_near(result, expected, dtype):
    """Against float64. Inputs are exact in dtype; a logit is a sum of DIM products, each addition rounded in float32,
    and the result is rounded once to dtype."""
    tolerance = DIM * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_lse(lse, expected):
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected.double(), **LSE_TOLERANCES)


def prefill(q_len, kv_len, dtype, layout="NHD"):
    """q, k, v of one sequence; k and v in the layout and as [L, Hk, D]."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(n, h, DIM, generator=generator).to(dtype) for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2)))
    turned = [x.transpose(0, 1).contiguous() if layout == "HND" else x for x in (k, v)]
    return q, *turned, k, v


def decodes(dtype=torch.float32, layout="NHD", **options):
    return Batch([1] * len(KV_LENS), KV_LENS, dtype=dtype, layout=layout, **options)


def planned(batch, **options):
    wrapper = PODWithPagedKVCacheWrapper(WORKSPACE, batch.layout)
    options = {"q_data_type": batch.dtype, **options}
    wrapper.plan(*batch.table, batch.num_q_heads, batch.num_kv_heads, DIM, batch.page_size, **options)
    return wrapper


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("layout_p", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
def test_prefill_and_decode_do_not_depend_on_each_other(dtype, layout, layout_p, causal):
    batch = decodes(dtype, layout)
    q, k, v, keys, values = prefill(5, 19, dtype, layout_p)
    wrapper = planned(batch)
    call = (q, k, v, batch.q, batch.pair)
    out_p, out_d = wrapper.run(*call, causal_p=causal, kv_layout_p=layout_p)
    assert out_p.dtype == out_d.dtype == dtype
    expected_p, expected_d = attend(q, keys, values, causal=causal), batch.expected()
    assert_near(out_p, expected_p[0], dtype)
    assert_near(out_d, expected_d[0], dtype)
    (again_p, lse_p), (again_d, lse_d) = wrapper.run(
        *call, causal_p=causal, kv_layout_p=layout_p, return_lse_p=True, return_lse_d=True
    )
    assert torch.equal(again_p, out_p)
    assert torch.equal(again_d, out_d)
    assert_lse(lse_p, expected_p[1])
    assert_lse(lse_d, expected_d[1])


def test_each_lse_is_returned_where_it_is_asked_for():
    batch = decodes()
    q, k, v, *_ = prefill(3, 8, torch.float32)
    wrapper = planned(batch)
    first, second = wrapper.run(q, k, v, batch.q, batch.pair, return_lse_p=True)
    assert isinstance(first, tuple)
    assert isinstance(second, torch.Tensor)
    first, second = wrapper.run(q, k, v, batch.q, batch.pair, return_lse_d=True)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, tuple)


@pytest.mark.parametrize("form", ["bool", "packed"])
def test_masks_of_prefill_and_decode(form):
    batch = decodes()
    q, k, v, *_ = prefill(5, 19, torch.float32)
    generator = torch.Generator().manual_seed(4)
    mask_p = torch.rand(5, 19, generator=generator) < 0.5
    masks_d = [torch.rand(1, n, generator=generator) < 0.5 for n in KV_LENS]
    flat = torch.cat([mask.flatten() for mask in masks_d])
    indptr = torch.tensor([0, *KV_LENS]).cumsum(0)
    if form == "bool":
        masks = {"custom_mask_p": mask_p, "custom_mask_d": flat}
    else:
        packed = segment_packbits(flat, indptr, "little")[0]
        masks = {"packed_custom_mask_p": packbits(mask_p, "little"), "packed_custom_mask_d": packed}
    wrapper = planned(batch)
    out_p, out_d = wrapper.run(q, k, v, batch.q, batch.pair, causal_p=True, **masks)
    assert_near(out_p, attend(q, k, v, mask=mask_p)[0], torch.float32)
    assert_near(out_d, batch.expected(masks=masks_d)[0], torch.float32)
    assert_near(wrapper.run(q, k, v, batch.q, batch.pair)[1], batch.expected()[0], torch.float32)


@pytest.mark.parametrize(
    "plan, run, named",
    [
        ({"window_left": 6}, {}, {"window_left": 6}),
        ({"window_left": 6}, {"window_left_d": 2}, {"window_left": 2}),
        ({"sm_scale": 0.3}, {}, {"sm_scale": 0.3}),
        ({"sm_scale": 0.3}, {"sm_scale_d": 0.2}, {"sm_scale": 0.2}),
        ({"sm_scale": 0.3}, {"q_scale": 2.0, "k_scale": torch.tensor([0.5])}, {"sm_scale": 0.3}),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e3}, {}, {"rope": {"theta": 1e3}}),
        ({"rope_theta": 1e3}, {"pos_encoding_mode_d": "ROPE_LLAMA"}, {"rope": {"theta": 1e3}}),
        (
            {"pos_encoding_mode": "ROPE_LLAMA"},
            {"rope_theta_d": 1e3, "rope_scale_d": 2.0},
            {"rope": {"theta": 1e3, "scale": 2.0}},
        ),
        ({"pos_encoding_mode": "ALIBI"}, {}, {"slopes": get_alibi_slopes(4)}),
        ({}, {"causal_d": True}, {}),
    ],
)
def test_options_of_decode_are_those_of_the_plan_unless_run_says_other(plan, run, named):
    batch = decodes(page_size=5)
    q, k, v, *_ = prefill(3, 8, torch.float32)
    wrapper = planned(batch, **plan)
    out_p, (out_d, lse_d) = wrapper.run(q, k, v, batch.q, batch.pair, return_lse_d=True, **run)
    expected = batch.expected(**named)
    assert_near(out_p, attend(q, k, v)[0], torch.float32)
    assert_near(out_d, expected[0], torch.float32)
    assert_lse(lse_d, expected[1])


@pytest.mark.parametrize(
    "run, named",
    [
        ({"window_left_p": 3}, {"window_left": 3}),
        ({"sm_scale_p": 0.2}, {"sm_scale": 0.2}),
        ({"pos_encoding_mode_p": "ROPE_LLAMA", "rope_theta_p": 1e3}, {"rope": {"theta": 1e3}}),
        ({"pos_encoding_mode_p": "ALIBI"}, {"slopes": get_alibi_slopes(4)}),
        ({"v_scale": 3.0, "q_scale": 2.0}, {}),
    ],
)
def test_options_of_prefill_are_its_own(run, named):
    batch = decodes()
    q, k, v, *_ = prefill(5, 12, torch.float32)
    out_p, _ = planned(batch, sm_scale=7.0, window_left=1).run(q, k, v, batch.q, batch.pair, causal_p=True, **run)
    assert_near(out_p, attend(q, k, v, causal=True, **named)[0], torch.float32)


def test_v_scale_is_that_of_decode():
    batch = decodes()
    q, k, v, *_ = prefill(3, 8, torch.float32)
    out = planned(batch).run(q, k, v, batch.q, batch.pair, v_scale=0.5)[1]
    assert_near(out, batch.expected()[0] * 0.5, torch.float32)


def test_a_layout_of_decode_may_differ_from_the_wrapper():
    batch = decodes(layout="HND")
    q, k, v, *_ = prefill(3, 8, torch.float32)
    wrapper = PODWithPagedKVCacheWrapper(WORKSPACE, "NHD")
    wrapper.begin_forward(*batch.table, 4, 2, DIM, 16, data_type=torch.float32, q_data_type=None)
    out = wrapper.run(q, k, v, batch.q, batch.combined, kv_layout_d="HND")[1]
    assert_near(out, batch.expected()[0], torch.float32)
    wrapper.end_forward()


def test_graph_mode_keeps_its_buffers_filled():
    batch = decodes()
    q, k, v, *_ = prefill(3, 8, torch.float32)
    buffers = [torch.zeros(6, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)]
    wrapper = PODWithPagedKVCacheWrapper(WORKSPACE, "NHD", True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    wrapper.plan(*batch.table, 4, 2, DIM, 16, q_data_type=torch.float32)
    assert torch.equal(buffers[0], batch.kv_indptr)
    assert torch.equal(buffers[2], batch.last_page_len)
    assert_near(wrapper.run(q, k, v, batch.q, batch.pair)[1], batch.expected()[0], torch.float32)
    with pytest.raises(ValueError, match="paged_kv_indices_buffer must be a tensor in CUDA graph mode"):
        PODWithPagedKVCacheWrapper(WORKSPACE, "NHD", True, buffers[0], None, buffers[2])


def test_nothing_to_decode_and_nothing_to_prefill():
    batch = Batch([], [], dtype=torch.float32)
    q, k, v, *_ = prefill(0, 0, torch.float32)
    out_p, out_d = planned(batch).run(q, k, v, batch.q, batch.pair)
    assert out_p.shape == out_d.shape == (0, 4, DIM)


def test_what_pod_refuses():
    batch = decodes()
    q, k, v, *_ = prefill(3, 8, torch.float32)
    wrapper = planned(batch)
    with pytest.raises(ValueError, match="q must have dtype float32 .set by plan., got float16"):
        wrapper.run(q, k, v, batch.q.half(), batch.pair)
    with pytest.raises(KeyError, match="kv_layout must be NHD or HND"):
        wrapper.run(q, k, v, batch.q, batch.pair, kv_layout_d="NDH")
    with pytest.raises(KeyError, match="pos_encoding_mode must be one of"):
        wrapper.run(q, k, v, batch.q, batch.pair, pos_encoding_mode_d="ROPE")
    with pytest.raises(NotImplementedError, match="jit_args is not supported"):
        PODWithPagedKVCacheWrapper(WORKSPACE, jit_args=[])
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        PODWithPagedKVCacheWrapper(WORKSPACE).run(q, k, v, batch.q, batch.pair)
    options = [None, None, False, "NHD", "NONE", None, -1, None, None, False]
    decode_options = [None, None, False, "NHD", "NONE", None, -1, None, None, None, None, None, False, False, None]
    with pytest.raises(TypeError, match="no positional arguments after enable_pdl, got 1"):
        wrapper.run(q, k, v, batch.q, batch.pair, *options, *decode_options, 1)


def batch_planned(first, second, **options):
    wrapper = BatchPODWithPagedKVCacheWrapper(WORKSPACE, first.layout)
    heads = first.num_q_heads, first.num_kv_heads, DIM, first.page_size
    options = {"q_data_type": first.dtype, **options}
    wrapper.plan(first.qo_indptr, *first.table, second.qo_indptr, *second.table, *heads, **options)
    return wrapper


def batches(dtype=torch.float32, layout="NHD", page_size=5, **options):
    options = {"dtype": dtype, "layout": layout, "page_size": page_size, **options}
    return Batch([3, 0, 7, 2], [12, 9, 7, 0], seed=1, **options), Batch([1, 1, 2], [21, 0, 3], seed=2, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_batches_of_prefill_and_decode(dtype, layout, page_size, index_dtype):
    first, second = batches(dtype, layout, page_size, index_dtype=index_dtype)
    wrapper = batch_planned(first, second)
    for causal in (False, True, False):
        outs, lses = wrapper.run(first.q, first.pair, second.q, second.combined, causal_p=causal, return_lse=True)
        expected = first.expected(causal=causal), second.expected()
        for out, lse, (expected_out, expected_lse) in zip(outs, lses, expected, strict=True):
            assert out.dtype == dtype
            assert_near(out, expected_out, dtype)
            assert_lse(lse, expected_lse)
        plain = wrapper.run(first.q, first.pair, second.q, second.combined, causal_p=causal)
        assert torch.equal(plain[0], outs[0])
        assert torch.equal(plain[1], outs[1])


@pytest.mark.parametrize("form", ["bool", "packed"])
def test_masks_of_a_batch_of_prefills(form):
    first, second = batches()
    masks = first.random_masks()
    flat = torch.cat([mask.flatten() for mask in masks])
    indptr = torch.tensor([0, *(mask.numel() for mask in masks)]).cumsum(0)
    packed = segment_packbits(flat, indptr, "little")[0]
    options = {"custom_mask_p": flat} if form == "bool" else {"packed_custom_mask_p": packed}
    wrapper = batch_planned(first, second)
    out = wrapper.run(first.q, first.pair, second.q, second.pair, causal_p=True, **options)[0]
    assert_near(out, first.expected(masks=masks)[0], torch.float32)
    out = wrapper.run(first.q, first.pair, second.q, second.pair, causal_p=True)[0]
    assert_near(out, first.expected(causal=True)[0], torch.float32)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"window_left": 3}, {"window_left": 3}),
        ({"sm_scale": 0.3}, {"sm_scale": 0.3}),
        ({"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0}, {"rope": {"scale": 2.0}}),
        ({"pos_encoding_mode": "ALIBI"}, {"slopes": get_alibi_slopes(4)}),
    ],
)
def test_options_of_a_plan_are_those_of_both(options, named):
    first, second = batches()
    wrapper = batch_planned(first, second, **options)
    out_p, out_d = wrapper.run(first.q, first.pair, second.q, second.pair, causal_p=True)
    assert_near(out_p, first.expected(causal=True, **named)[0], torch.float32)
    assert_near(out_d, second.expected(**named)[0], torch.float32)


def test_scales_of_a_batch_are_those_of_its_decodes():
    first, second = batches()
    wrapper = batch_planned(first, second, sm_scale=0.1)
    scales = {"q_scale": 3.0, "k_scale": torch.tensor(0.5), "v_scale": 2.0}
    out_p, out_d = wrapper.run(first.q, first.pair, second.q, second.pair, **scales)
    assert_near(out_p, first.expected(sm_scale=0.1)[0], torch.float32)
    assert_near(out_d / 2, second.expected(sm_scale=0.15)[0], torch.float32)


def test_the_plan_of_a_batch_does_not_follow_buffers_that_are_used_again():
    first, second = batches()
    wrapper = batch_planned(first, second)
    first.qo_indptr.zero_(), first.kv_indices.zero_(), second.qo_indptr.zero_()
    out_p, _ = wrapper.run(first.q, first.pair, second.q, second.pair, causal_p=False)
    fresh, _ = batches()
    assert_near(out_p, fresh.expected()[0], torch.float32)


def test_what_a_batch_refuses():
    first, second = batches()
    wrapper = batch_planned(first, second)
    with pytest.raises(ValueError, match="q must have 12 rows"):
        wrapper.run(first.q[1:], first.pair, second.q, second.pair)
    with pytest.raises(ValueError, match="q must have dtype float32"):
        wrapper.run(first.q, first.pair, second.q.half(), second.pair)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        BatchPODWithPagedKVCacheWrapper(WORKSPACE).run(first.q, first.pair, second.q, second.pair)
    with pytest.raises(KeyError, match="pos_encoding_mode must be one of"):
        batch_planned(first, second, pos_encoding_mode="none")
    assert not wrapper.is_cuda_graph_enabled
    wrapper.end_forward()
