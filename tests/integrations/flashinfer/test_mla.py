import itertools
import math
from unittest.mock import patch

import pytest
import torch
from oracle import attend

from pagedkv.integrations.flashinfer import decode, mla
from pagedkv.integrations.flashinfer.mla import BatchDecodeMlaWithPagedKVCacheWrapper, BatchMLAPagedAttentionWrapper
from pagedkv.testing.numeric import assert_close_to_oracle

WORKSPACE = torch.empty(1 << 10, dtype=torch.uint8)
Q_LENS, KV_LENS = [3, 1, 0, 7, 2, 0], [17, 40, 9, 5, 0, 0]


class LatentBatch:
    """Sequences on pages in random order, or on the pages of `rows`; slots that no sequence owns are NaN."""

    def __init__(
        self,
        q_lens,
        kv_lens,
        *,
        page_size=16,
        num_heads=3,
        latent_dim=64,
        rope_dim=16,
        dtype=torch.float16,
        index_dtype=torch.int32,
        rows=None,
        num_spare=0,
    ):
        needed = [-(-kv_len // page_size) for kv_len in kv_lens]
        num_pages = sum(needed) + 3
        if rows is None:
            ids = iter(torch.randperm(num_pages).tolist())
            rows = [[next(ids) for _ in range(count)] for count in needed]
        self.q_lens, self.kv_lens, self.page_size, self.dtype = q_lens, kv_lens, page_size, dtype
        self.num_heads, self.latent_dim, self.rope_dim = num_heads, latent_dim, rope_dim
        self.sm_scale = (latent_dim + rope_dim) ** -0.5
        cache = torch.randn(num_pages, page_size, latent_dim + rope_dim).to(dtype)
        owned = torch.zeros(num_pages, page_size, dtype=torch.bool)
        self.tokens = []
        for row, kv_len in zip(rows, kv_lens, strict=True):
            slots = [(row[t // page_size], t % page_size) for t in range(kv_len)]
            pages, offsets = torch.tensor(slots, dtype=torch.long).reshape(-1, 2).T
            owned[pages, offsets] = True
            self.tokens.append(cache[pages, offsets])
        cache[~owned] = torch.nan
        self.cache = cache
        # Spare pages at the end of a row are ids that no cache has.
        rows = [[*row, *([1 << 20] * num_spare)] for row in rows]
        self.qo_indptr = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=index_dtype)
        self.kv_indptr = torch.tensor([0, *itertools.accumulate(map(len, rows))], dtype=index_dtype)
        self.kv_indices = torch.tensor([*itertools.chain(*rows), -7, 1 << 20], dtype=index_dtype)
        self.kv_len_arr = torch.tensor(kv_lens, dtype=index_dtype)
        self.last_page_len = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens], dtype=index_dtype)
        self.q = torch.randn(sum(q_lens), num_heads, latent_dim + rope_dim).to(dtype)

    @property
    def arrays(self):
        return self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_len_arr

    @property
    def tensors(self):
        """q_nope, q_pe, ckv_cache, kpe_cache: views of one query and one cache."""
        return *self.q.tensor_split([self.latent_dim], -1), *self.cache.tensor_split([self.latent_dim], -1)

    def plan(self, wrapper, *, arrays=None, **options):
        named = {
            "num_heads": self.num_heads,
            "head_dim_ckv": self.latent_dim,
            "head_dim_kpe": self.rope_dim,
            "page_size": self.page_size,
            "causal": False,
            "sm_scale": self.sm_scale,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }
        wrapper.plan(*(arrays or self.arrays), **{**named, **options})
        return wrapper

    def planned(self, **options):
        return self.plan(BatchMLAPagedAttentionWrapper(WORKSPACE), **options)

    def expected(self, *, of_out=1.0, of_lse=1.0, **options):
        """(out, lse) times these factors, in float64 and in float32 arithmetic."""
        with patch.object(torch.Tensor, "double", torch.Tensor.float):
            plain = self._attend(**options)
        return [(out * of_out, lse * of_lse) for out, lse in (self._attend(**options), plain)]

    def _attend(self, **options):
        options = {"sm_scale": self.sm_scale, **options}
        states = []
        for q, tokens in zip(self.q.split(self.q_lens), self.tokens, strict=True):
            keys = tokens[:, None]
            states.append(attend(q, keys, keys[..., : self.latent_dim], **options))
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    def assert_close(self, result, expected):
        assert result[0].dtype == self.dtype
        assert result[1].dtype == torch.float32
        for name, actual, exact, plain in zip(("out", "lse"), result, *expected, strict=True):
            assert_close_to_oracle(name, actual, exact, plain)


def in_gaps(tensor):
    """A tensor of that shape and dtype whose last dim is contiguous and whose rows are not."""
    return tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)[..., : tensor.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_latents_serve_as_keys_and_as_values(dtype, page_size, causal):
    batch = LatentBatch(Q_LENS, KV_LENS, page_size=page_size, dtype=dtype)
    wrapper, expected = batch.planned(causal=causal), batch.expected(causal=causal)
    result = wrapper.run(*batch.tensors, return_lse=True)
    batch.assert_close(result, expected)
    separate = [tensor.contiguous() for tensor in batch.tensors]
    for again in (wrapper.run(*separate), wrapper.run(*batch.tensors)):
        assert torch.equal(again, result[0])
    # The sequence without tokens, and with `causal` the rows of the fourth before its first token.
    assert torch.isneginf(result[1][11:13]).all()
    assert bool(torch.isneginf(result[1][4:6]).all()) == causal


@pytest.mark.parametrize("widths", [(512, 64), (256, 64), (512, 0), (40, 8), (33, 2)])
def test_any_widths(widths):
    batch = LatentBatch([1, 4], [70, 33], num_heads=16, latent_dim=widths[0], rope_dim=widths[1], dtype=torch.bfloat16)
    wrapper = batch.planned(causal=True)
    batch.assert_close(wrapper.run(*batch.tensors, return_lse=True), batch.expected(causal=True))


def test_without_rope_keys_nothing_stands_for_them():
    batch = LatentBatch(Q_LENS, KV_LENS, rope_dim=0)
    wrapper = batch.planned()
    q_nope, q_pe, ckv_cache, kpe_cache = batch.tensors
    assert q_pe.shape[2] == kpe_cache.shape[2] == 0
    result = wrapper.run(q_nope, None, ckv_cache, None, return_lse=True)
    batch.assert_close(result, batch.expected())
    for one in ((q_pe, None), (None, kpe_cache), (q_pe, kpe_cache)):
        assert torch.equal(wrapper.run(q_nope, one[0], ckv_cache, one[1]), result[0])


@pytest.mark.parametrize("page_size", [1, 16])
def test_shared_and_repeated_pages(page_size):
    a, b, c = 5, 0, 2
    kv_lens = [3 * page_size, 2 * page_size, 3 * page_size - (page_size > 1), 0]
    batch = LatentBatch([2, 1, 3, 1], kv_lens, page_size=page_size, rows=[[a, b, a], [a, c], [c, c, b], []])
    batch.assert_close(batch.planned(causal=True).run(*batch.tensors, return_lse=True), batch.expected(causal=True))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_pages_beyond_the_length_are_ignored(index_dtype):
    batch = LatentBatch(Q_LENS, KV_LENS, page_size=5, index_dtype=index_dtype, num_spare=2)
    batch.assert_close(batch.planned().run(*batch.tensors, return_lse=True), batch.expected())


def test_an_empty_batch():
    batch = LatentBatch([], [])
    out, lse = batch.planned().run(*batch.tensors, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 3, 64), (0, 3))


def test_lse_is_of_base_2_or_natural():
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned()
    for given in (None, torch.empty(13, 3)):
        result = wrapper.run(*batch.tensors, lse=given, return_lse=True, return_lse_base_on_e=True)
        batch.assert_close(result, batch.expected(of_lse=math.log(2)))
        batch.assert_close(wrapper.run(*batch.tensors, lse=given, return_lse=True), batch.expected())


@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize("o_scale", [None, 0.3])
def test_buffers_are_written_in_place(has_gaps, o_scale):
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned()
    expected = wrapper.run(*batch.tensors, return_lse=True, o_scale=o_scale)
    out, lse = (in_gaps(x) if has_gaps else torch.empty_like(x) for x in expected)
    result = wrapper.run(*batch.tensors, out, lse, True, o_scale=o_scale)
    assert result[0] is out
    assert result[1] is lse
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    out.zero_()
    assert wrapper.run(*batch.tensors, out=out, o_scale=o_scale) is out
    assert torch.equal(out, expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_scale_of_the_output_is_a_number_or_a_tensor_of_one_element(dtype):
    batch = LatentBatch(Q_LENS, KV_LENS, dtype=dtype)
    wrapper, expected = batch.planned(), batch.expected(of_out=0.3)
    for o_scale in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
        result = wrapper.run(*batch.tensors, return_lse=True, o_scale=o_scale)
        batch.assert_close(result, expected)


def test_a_scaled_output_is_rounded_once():
    batch = LatentBatch([1] * 40, [9] * 40)
    q_nope, q_pe, *caches = batch.tensors
    unrounded = batch.planned(q_data_type="float32").run(q_nope.float(), q_pe.float(), *caches)
    once, twice = (unrounded * 0.3).half(), unrounded.half() * 0.3
    assert not torch.equal(once, twice)
    assert torch.equal(batch.planned().run(*batch.tensors, o_scale=0.3), once)


def test_caches_may_have_another_dtype_than_queries():
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned(q_data_type="float32", kv_data_type="float16")
    q_nope, q_pe, *caches = batch.tensors
    batch.dtype = torch.float32
    batch.assert_close(wrapper.run(q_nope.float(), q_pe.float(), *caches, return_lse=True), batch.expected())


def test_graph_mode_keeps_its_buffers_filled():
    batch = LatentBatch(Q_LENS, KV_LENS, index_dtype=torch.int64)
    buffers = [torch.full((n,), -1, dtype=torch.int32) for n in (7, 7, 20, 6)]
    wrapper = BatchMLAPagedAttentionWrapper(WORKSPACE, True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    batch.plan(wrapper)
    for buffer, array in zip(buffers, batch.arrays, strict=True):
        assert buffer[: len(array)].tolist() == array.tolist()
    batch.assert_close(wrapper.run(*batch.tensors, return_lse=True), batch.expected())
    # The buffers themselves, as callers that fill them first.
    batch.plan(wrapper, arrays=buffers)
    batch.assert_close(wrapper.run(*batch.tensors, return_lse=True), batch.expected())
    before = [buffer.clone() for buffer in buffers]
    smaller = LatentBatch(Q_LENS[:2], KV_LENS[:2])
    with pytest.raises(ValueError, match="qo_indptr must have exactly the 7 entries of its buffer"):
        smaller.plan(wrapper)
    larger = LatentBatch(Q_LENS, [400] * 6)
    with pytest.raises(ValueError, match="kv_indices must have at most the 20 entries of its buffer"):
        larger.plan(wrapper)
    assert all(map(torch.equal, buffers, before))
    for missing in range(4):
        given = [None if number == missing else buffer for number, buffer in enumerate(buffers)]
        with pytest.raises(ValueError, match="must be a tensor in CUDA graph mode, got NoneType"):
            BatchMLAPagedAttentionWrapper(WORKSPACE, True, *given)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_lengths_and_a_matrix_of_pages_take_the_place_of_the_planned_ones(index_dtype):
    planned = LatentBatch([2, 0], [5, 9])
    batch = LatentBatch([1, 1, 1, 1], [17, 0, 40, 16], index_dtype=index_dtype)
    wrapper = BatchMLAPagedAttentionWrapper(WORKSPACE, use_cuda_graph=True, backend="cutlass")
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        wrapper.run(*batch.tensors)
    unplanned = BatchMLAPagedAttentionWrapper(WORKSPACE, backend="cutlass")
    planned.plan(wrapper)
    planned.assert_close(wrapper.run(*planned.tensors, return_lse=True), planned.expected())
    matrix = torch.full((4, 5), 1 << 20, dtype=index_dtype)
    for row, (start, stop) in enumerate(itertools.pairwise(batch.kv_indptr.tolist())):
        matrix[row, : stop - start] = batch.kv_indices[start:stop]
    result = wrapper.run(*batch.tensors, kv_len=batch.kv_len_arr, page_table=matrix, return_lse=True)
    batch.assert_close(result, batch.expected())
    of_deepseek = (128 + batch.rope_dim) ** -0.5
    result_without_plan = unplanned.run(*batch.tensors, kv_len=batch.kv_len_arr, page_table=matrix, return_lse=True)
    batch.assert_close(result_without_plan, batch.expected(sm_scale=of_deepseek))
    # Columns of a wider matrix.
    view = torch.cat([matrix, matrix], 1)[:, :5]
    assert torch.equal(wrapper.run(*batch.tensors, kv_len=batch.kv_len_arr, page_table=view), result[0])
    with pytest.raises(ValueError, match="must be given together, got no page_table"):
        wrapper.run(*batch.tensors, kv_len=batch.kv_len_arr)
    with pytest.raises(
        ValueError, match=r"page_table must have shape \[B, M\] with B = 4 \(set by kv_len\), got \[3, 5\]"
    ):
        wrapper.run(*batch.tensors, kv_len=batch.kv_len_arr, page_table=matrix[:3])
    with pytest.raises(ValueError, match="of sequence 2 must be between 0 and 32"):
        wrapper.run(*batch.tensors, kv_len=batch.kv_len_arr, page_table=matrix[:, :2])
    with pytest.raises(ValueError, match="with backend='cutlass' only"):
        planned.planned().run(*batch.tensors, kv_len=batch.kv_len_arr, page_table=matrix)


@pytest.mark.parametrize("number, name", list(enumerate(["q_nope", "q_pe", "ckv_cache", "kpe_cache"])))
def test_tensors_must_be_what_was_planned(number, name):
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned()

    def run_with(tensor):
        tensors = list(batch.tensors)
        out = torch.full((13, 3, 64), 7.0, dtype=torch.float16)
        tensors[number] = tensor
        with pytest.raises((ValueError, TypeError)) as error:
            wrapper.run(*tensors, out=out)
        assert (out == 7).all()
        return type(error.value), str(error.value)

    tensor = batch.tensors[number]
    assert run_with(tensor.float()) == (ValueError, f"{name} must have dtype float16 (set by plan), got float32.")
    kind, words = run_with(tensor[..., 1:])
    assert kind is ValueError
    assert words.startswith(f"{name} must have shape")
    assert run_with(None)[0] is TypeError
    if number < 2:
        kind, words = run_with(tensor[1:])
        assert kind is ValueError
        assert f"{name} must have shape" in words
        assert "T = 13" in words
    else:
        assert "P = 16" in run_with(tensor[:, 1:])[1]
        assert run_with(tensor[:2])[0] is ValueError


def test_buffers_must_be_what_would_have_been_made():
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned()
    with pytest.raises(ValueError, match=r"out must have shape \[13, 3, 64\], got \[13, 3, 80\]"):
        wrapper.run(*batch.tensors, out=torch.empty_like(batch.q))
    with pytest.raises(ValueError, match="out must have dtype float16, got float32"):
        wrapper.run(*batch.tensors, out=torch.empty(13, 3, 64))
    with pytest.raises(ValueError, match=r"lse must have shape \[13, 3\], got \[3, 13\]"):
        wrapper.run(*batch.tensors, lse=torch.empty(3, 13), return_lse=True)
    with pytest.raises(ValueError, match="lse must have dtype float32, got float16"):
        wrapper.run(*batch.tensors, lse=torch.empty(13, 3, dtype=torch.float16), return_lse=True)


def test_a_plan_must_make_sense():
    batch = LatentBatch(Q_LENS, KV_LENS)
    with pytest.raises(TypeError, match="sm_scale must be a number, got None"):
        batch.planned(sm_scale=None)
    with pytest.raises(ValueError, match="kv_data_type of latent attention must be one of .*, got float8_e4m3fn"):
        batch.planned(kv_data_type=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="q_data_type of latent attention must be one of .*, got float8_e5m2"):
        batch.planned(q_data_type=torch.float8_e5m2)
    with pytest.raises(ValueError, match="head_dim_ckv must be at least 1, got 0"):
        batch.planned(head_dim_ckv=0)
    with pytest.raises(ValueError, match="head_dim_kpe must be at least 0, got -1"):
        batch.planned(head_dim_kpe=-1)
    with pytest.raises(ValueError, match=r"kv_len_arr of sequence 1 must be between 0 and 48 \(its pages\), got 99"):
        batch.planned(arrays=(*batch.arrays[:3], torch.tensor([17, 99, 9, 5, 0, 0])))
    with pytest.raises(NotImplementedError, match="use_profiler is not supported"):
        batch.planned(use_profiler=True)
    with pytest.raises(ValueError, match="backend must be one of auto, fa2, fa3, got 'trtllm-gen'"):
        BatchMLAPagedAttentionWrapper(WORKSPACE, backend="trtllm-gen")
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        BatchMLAPagedAttentionWrapper(WORKSPACE).run(*batch.tensors)


@pytest.mark.parametrize("name", ["ckv_scale", "ckv_scale_arr", "kpe_scale"])
def test_scales_of_quantised_caches_are_refused(name):
    batch = LatentBatch([1], [4])
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        batch.planned().run(*batch.tensors, **{name: 1.0})


def test_a_failed_plan_leaves_the_last_one():
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned()
    expected = wrapper.run(*batch.tensors)
    with pytest.raises(ValueError, match="latent attention"):
        batch.plan(wrapper, q_data_type=torch.float8_e5m2)
    assert torch.equal(wrapper.run(*batch.tensors), expected)


def test_workspaces_are_taken_and_results_do_not_depend_on_them():
    batch = LatentBatch(Q_LENS, KV_LENS)
    wrapper = batch.planned()
    expected = wrapper.run(*batch.tensors)
    wrapper.reset_workspace_buffer(torch.empty(4), torch.empty(4, dtype=torch.int8))
    assert torch.equal(wrapper.run(*batch.tensors), expected)
    assert wrapper.device == torch.device("cpu")
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        BatchMLAPagedAttentionWrapper(WORKSPACE[1:])


def test_dimensions_of_known_models():
    dimensions = [
        (d.qk_nope_head_dim, d.qk_rope_head_dim, d.v_head_dim, d.kv_lora_rank)
        for d in mla.supported_mla_head_dimensions
    ]
    assert dimensions == [(128, 64, 128, 512), (64, 64, 128, 256), (256, 0, 256, 512)]
    assert mla.deepseek_mla_dimensions in mla.supported_mla_head_dimensions


def legacy(batch, *buffers, **options):
    with pytest.warns(DeprecationWarning, match="use BatchMLAPagedAttentionWrapper"):
        wrapper = BatchDecodeMlaWithPagedKVCacheWrapper(WORKSPACE, bool(buffers), True, *buffers)
    named = {"sm_scale": batch.sm_scale, "data_type": batch.dtype, **options}
    arrays = batch.kv_indptr, batch.kv_indices, batch.last_page_len
    wrapper.plan(*arrays, batch.num_heads, batch.latent_dim, batch.page_size, **named)
    return wrapper


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("window_left", [-1, 6])
def test_the_older_decode_wrapper(dtype, page_size, window_left):
    batch = LatentBatch([1] * 4, [17, 0, 40, 16], page_size=page_size, latent_dim=64, rope_dim=8, dtype=dtype)
    # Rotation is the caller's, whatever these say.
    wrapper = legacy(batch, window_left=window_left, rope_scale=2.0, rope_theta=1e6, logits_soft_cap=0.0)
    assert wrapper.use_tensor_cores
    result = wrapper.run(*batch.tensors, return_lse=True)
    batch.assert_close(result, batch.expected(window_left=window_left))
    batch.assert_close(wrapper.run_return_lse(*batch.tensors), batch.expected(window_left=window_left))
    out, lse = torch.empty_like(result[0]), torch.empty_like(result[1])
    assert wrapper.run(*batch.tensors, out=out, lse=lse, return_lse=True)[0] is out
    assert torch.equal(out, result[0])
    assert torch.equal(lse, result[1])


def test_scales_of_the_older_decode_wrapper():
    batch = LatentBatch([1] * 3, [17, 0, 40], latent_dim=64, rope_dim=8)
    result = legacy(batch).run(*batch.tensors, q_scale=0.5, k_scale=torch.tensor([3.0]), v_scale=0.7, return_lse=True)
    batch.assert_close(result, batch.expected(sm_scale=batch.sm_scale * 1.5, of_out=0.7))


def test_graph_mode_of_the_older_decode_wrapper():
    batch = LatentBatch([1] * 3, [17, 0, 40], latent_dim=64, rope_dim=8)
    buffers = [torch.full((n,), -1, dtype=torch.int32) for n in (4, 20, 3)]
    wrapper = legacy(batch, *buffers)
    assert buffers[0].tolist() == batch.kv_indptr.tolist()
    assert buffers[2].tolist() == batch.last_page_len.tolist()
    batch.assert_close(wrapper.run(*batch.tensors, return_lse=True), batch.expected())
    with pytest.raises(ValueError, match="paged_kv_indices_buffer must be a tensor"):
        legacy(batch, buffers[0], None, buffers[2])


def test_what_the_older_decode_wrapper_refuses():
    batch = LatentBatch([1] * 3, [17, 0, 40], latent_dim=64, rope_dim=8)
    with pytest.raises(NotImplementedError, match="logits_soft_cap is not supported"):
        legacy(batch, logits_soft_cap=30.0)
    q_nope, q_pe, ckv_cache, kpe_cache = batch.tensors
    with pytest.raises(ValueError, match="paged_kpe_cache must have dtype float16"):
        legacy(batch).run(q_nope, q_pe, ckv_cache, kpe_cache.float())
    with pytest.raises(ValueError, match="q_nope must have dtype float32"):
        legacy(batch, q_data_type=torch.float32).run(q_nope, q_pe, ckv_cache, kpe_cache)
    with pytest.raises(ValueError, match="R = 8"):
        legacy(batch).run(q_nope, q_pe[..., :4], ckv_cache, kpe_cache[..., :4])


def test_decode_knows_the_older_wrapper():
    assert decode.BatchDecodeMlaWithPagedKVCacheWrapper is BatchDecodeMlaWithPagedKVCacheWrapper
