import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pagedkv
from pagedkv import Llama31Scaling, RotaryEmbedding
from pagedkv.kernels.cpu.native import available_isas
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_attention_close
from pagedkv.testing.poison import poison_unused

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3, E5M2 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
LLAMA31 = RotaryEmbedding(64, 500000.0, llama31=Llama31Scaling(old_context_len=100))

# Sampled so that every value of every axis appears, with the pairs most likely to matter together.
CASES = {
    "decode-f32": ([1, 1, 1], [40, 7, 300], {}),
    "decode-bf16": ([1, 1, 1], [40, 7, 300], {"dtype": BF16, "layout": "HND"}),
    "decode-f16": ([1, 1], [257, 33], {"dtype": F16, "page_size": 32}),
    "decode-G1-D128": ([1, 1], [100, 20], {"group": 1, "head_dim": 128}),
    "decode-G3-D80-P3": ([1, 1], [50, 301], {"group": 3, "head_dim": 80, "page_size": 3, "num_kv_heads": 3}),
    "decode-G4-D96-P1": ([1, 1], [77, 5], {"group": 4, "head_dim": 96, "page_size": 1, "dtype": BF16}),
    "decode-G8-D256": ([1], [90], {"group": 8, "head_dim": 256, "dtype": F16, "layout": "HND"}),
    "decode-G12-D40": ([1, 1], [30, 270], {"group": 12, "head_dim": 40, "num_kv_heads": 1}),
    "decode-D8": ([1, 1], [30, 64], {"head_dim": 8, "page_size": 32, "dtype": BF16}),
    "decode-D192-Dv128": ([1, 2], [70, 300], {"head_dim": 192, "value_dim": 128}),
    "decode-D576-Dv512": ([1], [40], {"head_dim": 576, "value_dim": 512, "num_kv_heads": 1, "dtype": BF16}),
    "decode-D64-Dv24": ([1, 1], [70, 3], {"value_dim": 24, "dtype": F16, "layout": "HND"}),
    "decode-f32-query": ([1, 1], [70, 3], {"dtype": BF16, "query_dtype": F32}),
    "decode-bf16-query": ([1, 1], [70, 3], {"dtype": F32, "query_dtype": BF16}),
    "verify-3": ([3, 3], [260, 12], {"group": 2}),
    "verify-5-G1-window": ([5, 4], [260, 12], {"group": 1, "window_left": 6}),
    "append": ([33, 9], [120, 270], {"group": 3, "page_size": 3}),
    "prefill": ([70], [70], {"group": 4}),
    "prefill-bf16-HND": ([40, 21], [40, 21], {"dtype": BF16, "layout": "HND", "head_dim": 128}),
    "prefill-f16-D40": ([37], [300], {"dtype": F16, "head_dim": 40, "value_dim": 8, "group": 8}),
    "prefill-window": ([150], [290], {"window_left": 40, "num_kv_heads": 1}),
    "prefill-full": ([30, 11], [64, 280], {"causal": False}),
    "prefill-full-window": ([30], [64], {"causal": False, "window_left": 5}),
    "mixed": ([1, 40, 0, 2, 1], [257, 60, 30, 2, 1], {"group": 4, "num_kv_heads": 1}),
    "soft-cap": ([1, 12], [80, 40], {"soft_cap": 3.0, "sm_scale": 1.0}),
    "sm-scale": ([1, 12], [80, 40], {"sm_scale": -0.7}),
    "sinks": ([1, 12], [80, 40], {"sinks": torch.tensor([0.3, 5.0, -math.inf, 2.0])}),
    "alibi": ([1, 12], [280, 40], {"alibi_slopes": torch.tensor([0.3, 0.0, 0.01, 0.1])}),
    "rope": ([1, 12], [280, 40], {"rope": RotaryEmbedding(64)}),
    "rope-interleaved-bf16": ([1, 40], [300, 60], {"rope": RotaryEmbedding(64, interleaved=True), "dtype": BF16}),
    "rope-llama31-scaled-P3": ([1, 3], [301, 40], {"rope": LLAMA31, "page_size": 3, "group": 3}),
    "rope-partial-D40-Dv24": ([1, 9], [40, 33], {"rope": RotaryEmbedding(24), "head_dim": 40, "value_dim": 24}),
    "rope-of-2-HND": ([2], [33], {"rope": RotaryEmbedding(2, interleaved=True), "layout": "HND", "group": 8}),
    "rope-more-rows-than-keys": ([7, 30, 3], [3, 10, 0], {"rope": LLAMA31, "causal": False}),
    "rope-D192-Dv128-f16": ([1, 70], [40, 70], {"rope": LLAMA31, "head_dim": 192, "value_dim": 128, "dtype": F16}),
    "int8": ([1, 12], [280, 40], {"dtype": I8}),
    "int8-bf16-query-HND": ([1, 40], [300, 60], {"dtype": I8, "query_dtype": BF16, "layout": "HND"}),
    "int8-float-scales": ([1, 12], [80, 40], {"dtype": I8, "key_scales": 0.02, "value_scales": 0.05}),
    "int8-one-float-scale": ([1, 12], [80, 40], {"dtype": I8, "key_scales": 0.02, "group": 3}),
    "e4m3": ([1, 12], [280, 40], {"dtype": E4M3, "page_size": 3}),
    "e4m3-f16-query-D128": ([1, 70], [90, 70], {"dtype": E4M3, "query_dtype": F16, "head_dim": 128, "group": 4}),
    "e4m3-no-scales": ([1, 12], [80, 40], {"dtype": E4M3, "key_scales": None, "value_scales": None}),
    "e5m2": ([1, 12], [280, 40], {"dtype": E5M2, "page_size": 1, "form": "interleaved"}),
    "e5m2-sliced-HND": ([3, 12], [33, 40], {"dtype": E5M2, "form": "sliced", "layout": "HND", "value_dim": 40}),
    "int8-rope-window": ([1, 70], [290, 70], {"dtype": I8, "rope": LLAMA31, "window_left": 40}),
    "e4m3-page-first-empty": ([0, 2, 1], [30, 0, 17], {"dtype": E4M3, "form": "page_first"}),
    "float-scales-bf16": ([1, 12], [80, 40], {"dtype": BF16, "key_scales": 0.3, "value_scales": -3.0}),
    "float-scales-soft-cap": ([1, 12], [80, 40], {"key_scales": 2.0, "soft_cap": 3.0, "sm_scale": 0.3}),
    "out-bf16": ([1, 12], [80, 40], {"out_dtype": BF16, "value_scales": 0.3}),
    "out-f32-of-f16": ([1, 12], [80, 40], {"dtype": F16, "out_dtype": F32}),
    "out-f16-of-bf16-int8": ([1, 12], [80, 40], {"dtype": I8, "query_dtype": BF16, "out_dtype": F16}),
    "chunk-boundaries": ([1, 1, 1, 1], [255, 256, 257, 512], {"num_kv_heads": 1}),
    "prefill-chunk-boundaries": ([9, 9, 9], [255, 257, 513], {"num_kv_heads": 1, "head_dim": 16, "group": 1}),
    "more-rows-than-keys": ([7, 30], [3, 10], {}),
    "interleaved": ([1, 9], [40, 33], {"form": "interleaved", "value_dim": 40}),
    "page-first": ([1, 9], [40, 33], {"form": "page_first", "layout": "HND", "dtype": BF16}),
    "sliced": ([1, 9], [40, 33], {"form": "sliced", "dtype": F16, "page_size": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_is_as_exact_as_torch(case, any_backend):
    q_lens, kv_lens, settings = CASES[case]
    batch = attention_batch(q_lens, kv_lens, **settings)
    state = batch.run(backend=any_backend)
    pages = batch.key_pages, batch.value_pages
    assert_attention_close(state, batch.query, *pages, batch.plan, layout=batch.layout, **batch.options)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_under_a_custom_mask(causal, any_backend):
    q_lens, kv_lens = [6, 40, 1], [6, 270, 33]
    mask = torch.rand(sum(q * kv for q, kv in zip(q_lens, kv_lens, strict=True))) < 0.6
    mask[: kv_lens[0]] = False
    batch = attention_batch(q_lens, kv_lens, causal=causal, custom_mask=mask, num_kv_heads=1)
    state = batch.run(backend=any_backend)
    assert state.out[0].eq(0).all()
    assert_attention_close(state, batch.query, batch.key_pages, batch.value_pages, batch.plan)


def test_query_strides_are_honoured(any_backend):
    batch = attention_batch([1, 12], [20, 30])
    wide = torch.randn(3, 13, 70, 4)
    query = wide.permute(1, 3, 2, 0).contiguous()[..., 1].permute(0, 1, 2)[:, :, 3:67].contiguous()
    strided = torch.empty(13, 4, 3, 64)[:, :, 1].copy_(query)
    assert not strided.is_contiguous()
    expected = dataclasses.replace(batch, query=query).run(backend=any_backend)
    assert torch.equal(dataclasses.replace(batch, query=strided).run(backend=any_backend).out, expected.out)


def test_rows_without_keys_give_zero_and_minus_infinity(any_backend):
    state = attention_batch([5, 2, 12], [2, 0, 0]).run(backend=any_backend)
    blind = [0, 1, 2, *range(5, 19)]
    assert state.out[blind].eq(0).all()
    assert state.lse[blind].eq(-math.inf).all()
    assert state.lse[3:5].isfinite().all()


def test_sinks_alone_give_zero_and_the_sink(any_backend):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    state = attention_batch([1, 12], [0, 0], sinks=sinks).run(backend=any_backend)
    assert state.out.eq(0).all()
    assert torch.equal(state.lse, sinks.expand(13, 4))


def test_an_empty_batch_gives_empty_results(any_backend):
    state = attention_batch([], []).run(backend=any_backend)
    assert state.out.shape == (0, 4, 64)
    assert state.lse.shape == (0, 4)


@pytest.mark.parametrize("q_len, group", [(3, 2), (40, 2)])
def test_later_tokens_of_a_sequence_never_reach_earlier_rows(q_len, group):
    """More than the contract asks: the native core keeps even a NaN of a later token of the same sequence out."""
    batch = attention_batch([q_len], [q_len + 20], group=group, page_size=1)
    expected = batch.run(backend="cpu")
    last = int(batch.table.indices[-1])
    batch.key_pages[last], batch.value_pages[last] = math.nan, math.nan
    state = batch.run(backend="cpu")
    assert torch.equal(state.out[:-1], expected.out[:-1])
    assert torch.equal(state.lse[:-1], expected.lse[:-1])
    assert state.out[-1].isnan().all()


def test_keys_outside_the_window_may_hold_nan(any_backend):
    batch = attention_batch([1], [300], window_left=9, page_size=1)
    expected = batch.run(backend=any_backend)
    kept = pagedkv.PageTable.from_rows([batch.table.indices[-10:].tolist()], [10], 1)
    for pages in (batch.key_pages, batch.value_pages):
        poison_unused(pages, kept)
    assert torch.equal(batch.run(backend=any_backend).out, expected.out)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_visible_nan_is_not_hidden(poison, any_backend):
    batch = attention_batch([1, 12], [40, 40])
    batch.key_pages[int(batch.table.indices[0]), 3] = math.nan
    batch.value_pages[int(batch.table.indices[3]), 3] = poison
    state = batch.run(backend=any_backend)
    assert state.out[0].isnan().all()
    assert not state.out[1:].isfinite().any()


def test_large_logits_do_not_overflow(any_backend):
    batch = attention_batch([1, 12], [300, 40], sm_scale=200.0)
    state = batch.run(backend=any_backend)
    assert_attention_close(state, batch.query, batch.key_pages, batch.value_pages, batch.plan, sm_scale=200.0)


@pytest.mark.parametrize("out_dtype", [None, BF16])
def test_out_is_filled_and_returned(out_dtype, any_backend):
    batch = attention_batch([1, 12], [40, 40])
    pages = batch.key_pages, batch.value_pages
    out = torch.empty(13, 4, 64, dtype=out_dtype)
    result = pagedkv.paged_attention(batch.query, *pages, batch.plan, out=out, out_dtype=out_dtype, backend=any_backend)
    assert result is out
    assert torch.equal(out, batch.run(backend=any_backend, out_dtype=out_dtype).out)


def call(batch, **changes):
    arguments = {
        "query": batch.query,
        "key_pages": batch.key_pages,
        "value_pages": batch.value_pages,
        "plan": batch.plan,
        "layout": batch.layout,
    }
    return pagedkv.paged_attention(**{**arguments, **changes})


MISUSE = {
    "plan": (lambda b: {"plan": b.table}, TypeError, "plan must be an AttentionPlan, got PageTable"),
    "layout": (lambda b: {"layout": "DHN"}, ValueError, "layout must be 'NHD' or 'HND', got 'DHN'"),
    "query-type": (lambda b: {"query": b.query.tolist()}, TypeError, r"query must be a torch\.Tensor, got list"),
    "query-tokens": (lambda b: {"query": b.query[1:]}, ValueError, r"query must have shape \[T, Hq, D\] with T = 5"),
    "query-dtype": (lambda b: {"query": b.query.double()}, TypeError, "query must have dtype float32 or"),
    "query-stride": (
        lambda b: {"query": torch.zeros(5, 4, 128)[..., ::2]},
        ValueError,
        r"query must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "query-device": (
        lambda b: {"query": b.query.to("meta")},
        ValueError,
        "query must be on cpu like key_pages, got meta",
    ),
    "page-size": (
        lambda b: {"key_pages": b.key_pages[:, :8]},
        ValueError,
        r"key_pages must have shape \[N, P, Hk, D\] with P = 16 \(set by the plan\)",
    ),
    "pages-dim": (lambda b: {"key_pages": b.key_pages[0]}, ValueError, r"key_pages must have shape \[N, P, Hk, D\]"),
    "pages-dtype": (lambda b: {"value_pages": b.value_pages.half()}, TypeError, "value_pages must have the dtype of"),
    "num-pages": (
        lambda b: {"key_pages": b.key_pages[:1], "value_pages": b.value_pages[:1]},
        ValueError,
        r"page ids of the plan must be below 1 \(N of key_pages\), got",
    ),
    "sm-scale": (lambda b: {"sm_scale": math.nan}, ValueError, "sm_scale must be a finite float32, got nan"),
    "soft-cap": (
        lambda b: {"soft_cap": -1.0},
        ValueError,
        r"soft_cap must be 0 \(off\) or a positive float32, got -1",
    ),
    "sinks-shape": (lambda b: {"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \[Hq\] with Hq = 4"),
    "sinks-dtype": (
        lambda b: {"sinks": torch.zeros(4).half()},
        TypeError,
        "sinks must have dtype float32, got float16",
    ),
    "alibi-shape": (lambda b: {"alibi_slopes": torch.zeros(4, 1)}, ValueError, r"alibi_slopes must have shape \[Hq\]"),
    "out-shape": (lambda b: {"out": torch.zeros(5, 4, 63)}, ValueError, r"out must have shape \[T, Hq, Dv\]"),
    "out-dtype": (
        lambda b: {"out": torch.zeros(5, 4, 64).half()},
        TypeError,
        "out must have dtype float32, got float16",
    ),
    "query-quantised": (lambda b: {"query": b.query.to(I8)}, TypeError, "query must have dtype float32 or .*got int8"),
    "pages-float64": (
        lambda b: {"key_pages": b.key_pages.double()},
        TypeError,
        "key_pages must have dtype float32 or .* or int8 or float8_e4m3fn or float8_e5m2, got float64",
    ),
    "out-stride": (
        lambda b: {"out": torch.zeros(5, 64, 4).transpose(1, 2)},
        ValueError,
        "out must be contiguous, got strides",
    ),
    "out-overlap": (lambda b: {"out": b.query}, ValueError, "out must not overlap query, got memory that both use"),
    "backend": (lambda b: {"backend": "abacus"}, ValueError, "backend must be 'auto' or one of"),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused_before_anything_is_written(misuse):
    change, error, words = MISUSE[misuse]
    batch = attention_batch([1, 4], [20, 30])
    query = batch.query.clone()
    with pytest.raises(error, match=words):
        call(batch, **change(batch))
    assert torch.equal(batch.query, query)


def test_explicit_cpu_refuses_odd_head_dims_and_auto_runs_them():
    batch = attention_batch([1, 4], [20, 30], head_dim=12)
    with pytest.raises(pagedkv.BackendUnavailableError, match="head dims must be multiples of 8, got 12 and 12"):
        batch.run(backend="cpu")
    assert_attention_close(batch.run(), batch.query, batch.key_pages, batch.value_pages, batch.plan)


ONE_ISA = """
import torch
from pagedkv import RotaryEmbedding
from pagedkv.kernels.cpu.native import core_isa
from pagedkv.testing.attention_batch import attention_batch
from pagedkv.testing.numeric import assert_attention_close
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
    for head_dim, value_dim, interleaved in ((40, 24, True), (128, 128, False)):
        rope = RotaryEmbedding(24, interleaved=interleaved) if dtype.itemsize < 4 else None
        batch = attention_batch([1, 3, 40], [270, 9, 60], group=3, head_dim=head_dim, value_dim=value_dim, dtype=dtype,
                                soft_cap=4.0, rope=rope)
        state = batch.run(backend="cpu")
        assert_attention_close(state, batch.query, batch.key_pages, batch.value_pages, batch.plan, **batch.options)
        torch.set_num_threads(1)
        again = batch.run(backend="cpu")
        torch.set_num_threads(2)
        assert torch.equal(again.out, state.out)
print(core_isa())
"""


@pytest.mark.parametrize("isa", available_isas())
def test_each_instruction_set_this_cpu_runs(isa):
    environment = {**os.environ, "PAGEDKV_CPU_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", ONE_ISA], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, isa), result.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_the_core_shares_the_thread_pool_of_torch():
    attention_batch([12], [300]).run(backend="cpu")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(mapped) == 1, mapped


def test_a_gradient_is_refused_not_lost(any_backend):
    key_pages, value_pages = torch.zeros(2, 2, 4, 1, 8)
    table = pagedkv.PageTable.from_rows([[1]], seq_lens=[3], page_size=4)
    plan = pagedkv.plan_attention(
        torch.tensor([0, 1], dtype=torch.int32), table, num_q_heads=1, num_kv_heads=1, head_dim=8
    )
    query = torch.zeros(1, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match="query must not require a gradient, got requires_grad=True"):
        pagedkv.paged_attention(query, key_pages, value_pages, plan, backend=any_backend)
    with torch.no_grad():
        assert not pagedkv.paged_attention(query, key_pages, value_pages, plan, backend=any_backend).requires_grad


def test_strided_index_tensors_are_read_as_their_values(any_backend):
    key_pages, value_pages = torch.randn(2, 4, 4, 2, 8)
    query, heads = torch.randn(2, 4, 8), torch.randn(4, 2)

    def spread(*values):
        return torch.tensor(values, dtype=torch.int32).repeat_interleave(2)[::2]

    results = []
    for index in (spread, lambda *values: torch.tensor(values, dtype=torch.int32)):
        table = pagedkv.PageTable(index(0, 2, 3), index(3, 1, 2), index(2, 4), page_size=4)
        mask = torch.tensor([True, False, True, True, True, True, True, False, True, True]).repeat_interleave(2)[::2]
        plan = pagedkv.plan_attention(
            index(0, 1, 2), table, num_q_heads=4, num_kv_heads=2, head_dim=8, custom_mask=mask
        )
        results.append(
            pagedkv.paged_attention(query, key_pages, value_pages, plan, sinks=heads[:, 0], backend=any_backend)
        )
    assert torch.equal(*results)


def small_batch():
    key_pages, value_pages = torch.randn(2, 8, 4, 2, 16)
    table = pagedkv.PageTable.from_rows([[0, 1, 2], [3]], seq_lens=[9, 3], page_size=4)
    plan = pagedkv.plan_attention(
        torch.tensor([0, 3, 4], dtype=torch.int32), table, num_q_heads=4, num_kv_heads=2, head_dim=16
    )
    return torch.randn(4, 4, 16), key_pages, value_pages, plan


@pytest.mark.parametrize(
    "name, index, value, words",
    [
        ("page_indices", 1, 2**30, "a page id outside the pool at sequence 0"),
        ("page_indices", 0, -1, "a page id outside the pool at sequence 0"),
        ("page_indptr", 2, 9, "a page_indptr outside page_indices at sequence 1"),
        ("seq_lens", 1, 5, "a length its pages cannot hold at sequence 1"),
        ("query_indptr", 1, 5, "a query_indptr that decreases at sequence 1"),
        ("query_indptr", 2, 3, "another number of query rows"),
    ],
)
def test_core_refuses_a_plan_whose_arrays_were_changed(name, index, value, words):
    """Nothing that happens to a plan makes the core read or write outside the tensors."""
    query, key_pages, value_pages, plan = small_batch()
    getattr(plan, name)[index] = value
    with pytest.raises(ValueError, match=words):
        pagedkv.paged_attention(query, key_pages, value_pages, plan, backend="cpu")


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_later_value_never_reaches_an_earlier_row(any_backend, garbage):
    query, key_pages, value_pages, plan = small_batch()
    before = pagedkv.paged_attention(query, key_pages, value_pages, plan, backend=any_backend)
    value_pages[2, 0] = garbage  # the last key of the first sequence: its last row sees it, the two before do not
    after = pagedkv.paged_attention(query, key_pages, value_pages, plan, backend=any_backend)
    assert after.isfinite().all(dim=(1, 2)).tolist() == [True, True, False, True]
    if any_backend == "cpu":  # the reference sums such rows one by one, in another order
        assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"sm_scale": "x"}, TypeError, "sm_scale must be a number, got str"),
        ({"sm_scale": 1e39}, ValueError, "sm_scale must be a finite float32, got 1e"),
        ({"sm_scale": 10**400}, ValueError, "sm_scale must be a finite float32, got 1000"),
        ({"soft_cap": 1e-50}, ValueError, r"soft_cap must be 0 \(off\) or a positive float32, got 1e-50"),
    ],
)
def test_scale_and_cap_are_checked_as_kernels_use_them(options, error, words):
    with pytest.raises(error, match=words):
        pagedkv.paged_attention(*small_batch(), **options)


def test_negated_views_are_refused_not_read_as_positive():
    query, key_pages, value_pages, plan = small_batch()
    with pytest.raises(ValueError, match="query must hold its values as they are, got a negated view"):
        pagedkv.paged_attention(torch._neg_view(query), key_pages, value_pages, plan)


def test_autograd_learns_of_writes_in_place(any_backend):
    pages = torch.zeros(2, 2, 4, 1, 8)
    weight = torch.ones(2, 4, 1, 8, requires_grad=True)
    product = (weight * pages[0]).sum()
    pagedkv.store_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), *pages, torch.tensor([1]), backend=any_backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
