"""mla_attention: as exact as torch over NaN in unused slots, and refused with words where it cannot be right."""

import dataclasses
import itertools
import math

import pytest
import torch

import pagedkv
from pagedkv.testing.mla_batch import mla_batch
from pagedkv.testing.mla_numeric import assert_mla_close, mla_oracle
from pagedkv.testing.numeric import assert_close_to_oracle

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

BACKENDS = [name for name, status in pagedkv.backends().items() if status.available and "mla_attention" in status.ops]
# Those that promise a sequence the same bits in any company: not plain torch, nor a cut that follows the size of a GPU.
INVARIANT_BACKENDS = [name for name in BACKENDS if name not in ("reference", "triton")]

DEEPSEEK = {"latent_dim": 512, "rope_dim": 64}

# Sampled so that every value of every axis appears, with the pairs most likely to matter together.
CASES = {
    "decode-f32": ([1, 1, 1], [40, 7, 300], {}),
    "decode-H1-C40-R8": ([1, 1], [40, 270], {"num_heads": 1, "latent_dim": 40, "rope_dim": 8}),
    "decode-H16-C512-R64-bf16": ([1, 1], [70, 260], {"num_heads": 16, "dtype": BF16, "page_size": 64, **DEEPSEEK}),
    "decode-H128-C512-R64-f16-joined": ([1], [33], {"num_heads": 128, "dtype": F16, "form": "joined", **DEEPSEEK}),
    "decode-H16-C256-R0": ([1, 1], [90, 16], {"num_heads": 16, "latent_dim": 256, "rope_dim": 0}),
    "decode-R0-joined-bf16": ([1, 2], [90, 17], {"rope_dim": 0, "form": "joined", "dtype": BF16}),
    "decode-P1": ([1, 1], [77, 5], {"page_size": 1, "dtype": BF16}),
    "decode-P3-joined": ([1, 1], [50, 301], {"page_size": 3, "form": "joined", "num_heads": 16}),
    "full-page-and-one-more": ([1, 1, 1], [16, 17, 1], {"form": "joined"}),
    "decode-f32-query": ([1, 1], [70, 3], {"dtype": BF16, "query_dtype": F32}),
    "decode-bf16-query": ([1, 1], [70, 3], {"dtype": F32, "query_dtype": BF16}),
    "verify-3": ([3, 3], [260, 12], {"num_heads": 16, "form": "joined"}),
    "append-H16": ([33, 9], [120, 270], {"num_heads": 16, "page_size": 3}),
    "append-C512-R64-bf16-joined": ([12], [80], {"num_heads": 16, "dtype": BF16, "form": "joined", **DEEPSEEK}),
    "prefill": ([70], [70], {"form": "joined"}),
    "prefill-bf16-H1": ([40, 21], [40, 21], {"dtype": BF16, "num_heads": 1}),
    "prefill-f16-R8": ([37], [300], {"dtype": F16, "latent_dim": 40, "rope_dim": 8, "num_heads": 16}),
    "prefill-window": ([150], [290], {"window_left": 40}),
    "decode-window": ([1, 1], [290, 5], {"window_left": 6, "form": "joined"}),
    "prefill-full": ([30, 11], [64, 280], {"causal": False}),
    "mixed": ([1, 40, 0, 2, 1], [257, 60, 30, 2, 1], {"num_heads": 16, "form": "joined"}),
    "mixed-with-empty": ([1, 0, 12, 0], [257, 0, 20, 9], {"dtype": BF16}),
    "sm-scale": ([1, 12], [80, 40], {"sm_scale": -0.7}),
    "chunk-boundaries": ([1, 1, 1, 1], [255, 256, 257, 512], {}),
    "prefill-chunk-boundaries": ([9, 9, 9], [255, 257, 513], {"latent_dim": 16, "rope_dim": 8, "num_heads": 1}),
    "more-rows-than-keys": ([7, 30], [3, 10], {}),
    "page-first": ([1, 9], [40, 33], {"form": "page_first", "dtype": BF16}),
    "sliced": ([1, 9], [40, 33], {"form": "sliced", "dtype": F16, "page_size": 3}),
}


@pytest.fixture(params=BACKENDS)
def mla_backend(request):
    """Each back end of this machine that has the op."""
    return request.param


def assert_close(state, batch):
    assert state.out.dtype == batch.q_latent.dtype
    assert_mla_close(state, **batch.arguments())


@pytest.mark.parametrize("case", CASES)
def test_attention_is_as_exact_as_torch(case, mla_backend):
    q_lens, kv_lens, settings = CASES[case]
    batch = mla_batch(q_lens, kv_lens, **settings)
    assert_close(batch.run(backend=mla_backend), batch)


@pytest.mark.parametrize("rope_dim", [0, 3])
def test_auto_runs_dims_of_any_size(rope_dim):
    batch = mla_batch([1, 6], [40, 9], latent_dim=7, rope_dim=rope_dim, form="joined")
    assert_close(batch.run(), batch)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_under_a_custom_mask(causal, mla_backend):
    q_lens, kv_lens = [6, 40, 1], [6, 270, 33]
    mask = torch.rand(sum(q * kv for q, kv in zip(q_lens, kv_lens, strict=True))) < 0.6
    mask[: kv_lens[0]] = False
    batch = mla_batch(q_lens, kv_lens, causal=causal, custom_mask=mask)
    state = batch.run(backend=mla_backend)
    assert state.out[0].eq(0).all()
    assert_close(state, batch)


def test_a_mask_and_a_window_both_hide(mla_backend):
    mask = torch.rand(9 * 40) < 0.6
    batch = mla_batch([9], [40], window_left=11, custom_mask=mask, form="joined")
    assert_close(batch.run(backend=mla_backend), batch)


def test_rows_without_keys_give_zero_and_minus_infinity(mla_backend):
    state = mla_batch([5, 2, 12], [2, 0, 0]).run(backend=mla_backend)
    blind = [0, 1, 2, *range(5, 19)]
    assert state.out[blind].eq(0).all()
    assert state.lse[blind].eq(-math.inf).all()
    assert state.lse[3:5].isfinite().all()


def test_an_empty_batch_gives_empty_results(mla_backend):
    state = mla_batch([], []).run(backend=mla_backend)
    assert state.out.shape == (0, 3, 64)
    assert state.lse.shape == (0, 3)


def test_no_rope_is_said_by_none_or_by_width_0(mla_backend):
    batch = mla_batch([1, 4], [20, 30], rope_dim=0)
    expected = batch.run(backend=mla_backend)
    empty = {"q_rope": torch.empty(5, 3, 0), "rope_pages": batch.latent_pages[..., :0]}
    for changes in (empty, {"q_rope": empty["q_rope"]}, {"rope_pages": empty["rope_pages"]}):
        assert torch.equal(dataclasses.replace(batch, **changes).run(backend=mla_backend).out, expected.out)


def test_joined_pages_give_the_bits_of_separate_ones(mla_backend):
    batch = mla_batch([1, 4, 40], [20, 30, 270], page_size=3)
    joined = torch.cat([batch.latent_pages, batch.rope_pages], 2)
    views = dataclasses.replace(batch, latent_pages=joined[..., :64], rope_pages=joined[..., 64:])
    assert torch.equal(views.run(backend=mla_backend).out, batch.run(backend=mla_backend).out)


def test_query_strides_are_honoured(mla_backend):
    batch = mla_batch([1, 12], [20, 30])
    # One projection that holds both parts, as models make it, and heads outside tokens.
    joined = torch.cat([batch.q_latent, batch.q_rope], 2).transpose(0, 1).contiguous().transpose(0, 1)
    views = dataclasses.replace(batch, q_latent=joined[..., :64], q_rope=joined[..., 64:])
    assert not views.q_latent.is_contiguous()
    assert_close(views.run(backend=mla_backend), batch)


def test_keys_outside_the_window_may_hold_nan(mla_backend):
    batch = mla_batch([1], [300], window_left=9, page_size=1)
    expected = batch.run(backend=mla_backend)
    hidden = batch.table.indices[:-10].long()
    batch.latent_pages[hidden], batch.rope_pages[hidden] = math.nan, math.nan
    assert torch.equal(batch.run(backend=mla_backend).out, expected.out)


@pytest.mark.parametrize("q_len", [3, 40])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_later_tokens_never_reach_earlier_rows(garbage, q_len, mla_backend):
    batch = mla_batch([q_len], [q_len + 20], page_size=1)
    expected = mla_oracle(**batch.arguments())
    plain = mla_oracle(**batch.arguments(), arithmetic=torch.float32)
    last = int(batch.table.indices[-1])
    batch.latent_pages[last], batch.rope_pages[last] = garbage, garbage
    state = batch.run(backend=mla_backend)
    assert_close_to_oracle("out", state.out[:-1], expected.out[:-1], plain.out[:-1])
    assert not state.out[-1].isfinite().any()


@pytest.mark.parametrize("part", ["latent_pages", "rope_pages"])
def test_visible_nan_is_not_hidden(part, mla_backend):
    batch = mla_batch([1, 12], [40, 40])
    getattr(batch, part)[int(batch.table.indices[0]), 3] = math.nan
    state = batch.run(backend=mla_backend)
    assert state.out[0].isnan().all()
    assert state.out[1:].isfinite().all()


def test_large_logits_do_not_overflow(mla_backend):
    batch = mla_batch([1, 12], [300, 40], sm_scale=200.0)
    assert_close(batch.run(backend=mla_backend), batch)


def test_out_is_filled_and_returned(mla_backend):
    batch = mla_batch([1, 12], [40, 40], form="joined")
    out = torch.empty(13, 3, 64)
    assert pagedkv.mla_attention(**batch.arguments(), out=out, backend=mla_backend) is out
    assert torch.equal(out, batch.run(backend=mla_backend).out)


def test_absorbed_weights_give_attention_over_uncompressed_keys(mla_backend):
    """The point of the op: heads with keys and values of their own, out of one cached latent a token."""
    num_heads, nope_dim, rope_dim, latent_dim, value_dim, kv_len = 4, 24, 8, 40, 16, 37
    batch = mla_batch([5], [kv_len], num_heads=num_heads, latent_dim=latent_dim, rope_dim=rope_dim, dtype=F32)
    w_uk, w_uv = torch.randn(num_heads, nope_dim, latent_dim), torch.randn(num_heads, latent_dim, value_dim)
    q_nope = torch.randn(5, num_heads, nope_dim)
    scale = (nope_dim + rope_dim) ** -0.5
    slots = batch.table.slot_mapping(torch.tensor([0, kv_len], dtype=torch.int32))
    latent, rope = (pages.flatten(0, 1)[slots] for pages in (batch.latent_pages, batch.rope_pages))

    def uncompressed(dtype):
        up = {"latent": latent, "rope": rope, "q_nope": q_nope, "q_rope": batch.q_rope, "uk": w_uk, "uv": w_uv}
        up = {name: tensor.to(dtype) for name, tensor in up.items()}
        key = torch.cat(
            [torch.einsum("kc,hnc->hkn", up["latent"], up["uk"]), up["rope"].expand(num_heads, kv_len, rope_dim)], 2
        )
        value = torch.einsum("kc,hcv->hkv", up["latent"], up["uv"])
        query = torch.cat([up["q_nope"], up["q_rope"]], 2).transpose(0, 1)
        seen = torch.ones(5, kv_len, dtype=torch.bool).tril(kv_len - 5)
        logits = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        return (torch.softmax(logits, 2) @ value).transpose(0, 1)

    absorbed = dataclasses.replace(batch, q_latent=torch.einsum("thn,hnc->thc", q_nope, w_uk), sm_scale=scale)
    out = torch.einsum("thc,hcv->thv", absorbed.run(backend=mla_backend).out, w_uv)
    assert_close_to_oracle("out", out, uncompressed(torch.float64), uncompressed(torch.float32))


# Decode and prefill, many and few rows, lengths around the boundaries of a kernel's chunks of keys.
INVARIANCE_SETTINGS = {
    "f32-joined": {"form": "joined"},
    "bf16-H16": {"dtype": BF16, "num_heads": 16},
    "f16-H1-P1-window": {"dtype": F16, "num_heads": 1, "page_size": 1, "window_left": 70},
    "C40-R8": {"latent_dim": 40, "rope_dim": 8},
    "R0": {"rope_dim": 0},
}
Q_LENS, KV_LENS = [1, 70, 3, 1, 12], [600, 300, 256, 1, 513]


def part_of(batch, sequence, first=0, last=None):
    """Rows [first, last) of one sequence as a batch of their own, as if the later rows were not there yet."""
    starts = batch.plan.query_indptr.tolist()
    start, stop = starts[sequence : sequence + 2]
    last = stop - start if last is None else last
    kv_len = int(batch.plan.seq_lens[sequence]) - (stop - start) + last
    first_page, last_page = batch.table.indptr[sequence : sequence + 2].tolist()
    pages = batch.table.indices[first_page:last_page].tolist()
    table = pagedkv.PageTable.from_rows([pages], [kv_len], batch.table.page_size)
    plan = pagedkv.plan_attention(
        torch.tensor([0, last - first], dtype=torch.int32),
        table,
        num_q_heads=batch.plan.num_q_heads,
        num_kv_heads=1,
        head_dim=batch.plan.head_dim,
        value_dim=batch.plan.value_dim,
        window_left=batch.plan.window_left,
    )
    rows = slice(start + first, start + last)
    q_rope = None if batch.q_rope is None else batch.q_rope[rows]
    return rows, dataclasses.replace(batch, q_latent=batch.q_latent[rows], q_rope=q_rope, table=table, plan=plan)


def assert_same(part, whole, rows):
    assert torch.equal(part.out, whole.out[rows])
    assert torch.equal(part.lse, whole.lse[rows])


@pytest.mark.parametrize("settings", INVARIANCE_SETTINGS)
def test_a_sequence_alone_gives_the_bits_it_gives_in_the_batch(settings):
    batch = mla_batch(Q_LENS, KV_LENS, **INVARIANCE_SETTINGS[settings])
    for backend in INVARIANT_BACKENDS:
        whole = batch.run(backend=backend)
        for sequence in range(len(Q_LENS)):
            rows, alone = part_of(batch, sequence)
            assert_same(alone.run(backend=backend), whole, rows)


@pytest.mark.parametrize("settings", INVARIANCE_SETTINGS)
@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 70), (0, 8, 9, 41, 70), (0, 35, 70), tuple(range(60, 71))])
def test_any_chunks_of_rows_give_the_bits_of_all_at_once(cuts, settings):
    batch = mla_batch(Q_LENS[:2], KV_LENS[:2], **INVARIANCE_SETTINGS[settings])
    for backend in INVARIANT_BACKENDS:
        whole = batch.run(backend=backend)
        for first, last in itertools.pairwise(cuts):
            rows, chunk = part_of(batch, 1, first, last)
            assert_same(chunk.run(backend=backend), whole, rows)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(num_threads):
    batch = mla_batch(Q_LENS, KV_LENS)
    for backend in INVARIANT_BACKENDS:
        torch.set_num_threads(2)
        whole = batch.run(backend=backend)
        torch.set_num_threads(num_threads)
        assert_same(batch.run(backend=backend), whole, slice(None))


MISUSE = {
    "plan": (lambda b: {"plan": b.table}, TypeError, "plan must be an AttentionPlan, got PageTable"),
    "plan-of-plain-attention": (
        lambda b: {"plan": dataclasses.replace(b.plan, value_dim=80)},
        ValueError,
        r"plan must have num_kv_heads = 1, head_dim = C \+ R = 80 and value_dim = C = 64, got 1, 80 and 80\. Build it",
    ),
    "plan-of-several-kv-heads": (
        lambda b: {"plan": dataclasses.replace(b.plan, num_kv_heads=3)},
        ValueError,
        "plan must have num_kv_heads = 1, .*, got 3, 80 and 64",
    ),
    "plan-with-rope-for-pages-without": (
        lambda b: {"q_rope": None, "rope_pages": None},
        ValueError,
        r"plan must have num_kv_heads = 1, head_dim = C \+ R = 64 and value_dim = C = 64, got 1, 80 and 64",
    ),
    "rope-query-missing": (
        lambda b: {"q_rope": None},
        ValueError,
        "q_rope must be given for rope_pages with R = 16, got None",
    ),
    "rope-pages-missing": (
        lambda b: {"rope_pages": None, "plan": dataclasses.replace(b.plan, head_dim=64)},
        ValueError,
        r"q_rope must have shape \[T, H, R\] with .*R = 0 \(set by rope_pages = None\), got \[5, 3, 16\]",
    ),
    "query-type": (lambda b: {"q_latent": None}, TypeError, r"q_latent must be a torch\.Tensor, got NoneType"),
    "query-tokens": (
        lambda b: {"q_latent": b.q_latent[1:]},
        ValueError,
        r"q_latent must have shape \[T, H, C\] with T = 5 \(set by the plan\), H = 3 \(set by the plan\)",
    ),
    "rope-query-heads": (lambda b: {"q_rope": b.q_rope[:, 1:]}, ValueError, r"q_rope must have shape \[T, H, R\] with"),
    "query-dtype": (lambda b: {"q_latent": b.q_latent.double()}, TypeError, "q_latent must have dtype float32 or"),
    "rope-query-dtype": (
        lambda b: {"q_rope": b.q_rope.half()},
        TypeError,
        "q_rope must have dtype float32, got float16",
    ),
    "query-stride": (
        lambda b: {"q_latent": torch.zeros(5, 3, 128)[..., ::2]},
        ValueError,
        r"q_latent must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "query-device": (
        lambda b: {"q_rope": b.q_rope.to("meta")},
        ValueError,
        "q_rope must be on cpu like latent_pages, got meta",
    ),
    "pages-with-heads": (
        lambda b: {"latent_pages": b.latent_pages[:, :, None]},
        ValueError,
        r"latent_pages must have shape \[N, P, C\] with P = 16 \(set by the plan\), got",
    ),
    "page-size": (
        lambda b: {"latent_pages": b.latent_pages[:, :8]},
        ValueError,
        r"latent_pages must have shape \[N, P, C\] with P = 16 \(set by the plan\), got",
    ),
    "rope-pages-fewer": (
        lambda b: {"rope_pages": b.rope_pages[1:]},
        ValueError,
        r"rope_pages must have shape \[N, P, R\] with N = \d+ \(set by latent_pages\), P = 16 \(set by the plan\)",
    ),
    "pages-dtype": (
        lambda b: {"latent_pages": b.latent_pages.to(torch.int8)},
        TypeError,
        "latent_pages must have dtype float32 or float16 or bfloat16, got int8",
    ),
    "rope-pages-dtype": (
        lambda b: {"rope_pages": b.rope_pages.half()},
        TypeError,
        "rope_pages must have dtype float32, got float16",
    ),
    "pages-stride": (
        lambda b: {"rope_pages": torch.zeros(*b.rope_pages.shape, 2)[..., 0]},
        ValueError,
        r"rope_pages must have a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "num-pages": (
        lambda b: {"latent_pages": b.latent_pages[:1], "rope_pages": b.rope_pages[:1]},
        ValueError,
        r"page ids of the plan must be below 1 \(N of latent_pages\), got",
    ),
    "sm-scale": (lambda b: {"sm_scale": math.nan}, ValueError, "sm_scale must be a finite float32, got nan"),
    "sm-scale-none": (lambda b: {"sm_scale": None}, TypeError, "sm_scale must be a number, got NoneType"),
    "gradient": (
        lambda b: {"q_rope": b.q_rope.clone().requires_grad_()},
        ValueError,
        "q_rope must not require a gradient, got requires_grad=True",
    ),
    "negated": (
        lambda b: {"q_latent": torch._neg_view(b.q_latent)},
        ValueError,
        "q_latent must hold its values as they are, got a negated view",
    ),
    "out-shape": (
        lambda b: {"out": torch.zeros(5, 3, 80)},
        ValueError,
        r"out must have the shape of q_latent, \[5, 3, 64\], got \[5, 3, 80\]",
    ),
    "out-dtype": (
        lambda b: {"out": torch.zeros(5, 3, 64).half()},
        TypeError,
        "out must have dtype float32, got float16",
    ),
    "out-stride": (
        lambda b: {"out": torch.zeros(5, 64, 3).transpose(1, 2)},
        ValueError,
        "out must be contiguous, got strides",
    ),
    "out-type": (lambda b: {"out": [1.0]}, TypeError, r"out must be a torch\.Tensor, got list"),
    "out-negated": (
        lambda b: {"out": torch._neg_view(torch.zeros(5, 3, 64))},
        ValueError,
        "out must hold its values as they are, got a negated view",
    ),
    "out-overlap": (lambda b: {"out": b.q_latent}, ValueError, "out must not overlap q_latent, got memory that both"),
    "backend": (lambda b: {"backend": "abacus"}, ValueError, "backend must be 'auto' or one of"),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused_before_anything_is_written(misuse):
    change, error, words = MISUSE[misuse]
    batch = mla_batch([1, 4], [20, 30])
    out, query = torch.zeros(5, 3, 64), batch.q_latent.clone()
    with pytest.raises(error, match=words):
        pagedkv.mla_attention(**{**batch.arguments(), "out": out, **change(batch)})
    assert out.eq(0).all()
    assert torch.equal(batch.q_latent, query)


def test_sm_scale_has_no_default():
    batch = mla_batch([1], [5])
    arguments = batch.arguments()
    del arguments["sm_scale"]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'sm_scale'"):
        pagedkv.mla_attention(**arguments)


@pytest.mark.parametrize("rope_dim", [0, 8])
def test_opcheck(rope_dim):
    batch = mla_batch([1, 4], [20, 30], latent_dim=8, rope_dim=rope_dim, form="joined")
    pages = batch.latent_pages.nan_to_num(), None if batch.rope_pages is None else batch.rope_pages.nan_to_num()
    arguments = (batch.q_latent, batch.q_rope, *pages, *batch.plan.pack(), 0.125, True, "auto")
    torch.library.opcheck(torch.ops.pagedkv.mla_attention, arguments)


@pytest.mark.parametrize("rope_dim", [0, 8])
def test_compiled_call_gives_the_same_bits(rope_dim):
    batch = mla_batch([1, 4], [20, 30], latent_dim=16, rope_dim=rope_dim, form="joined")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q_latent, out=None):
        return pagedkv.mla_attention(**{**batch.arguments(), "q_latent": q_latent}, return_lse=True, out=out)

    out = torch.empty(5, 3, 16)
    eager = batch.run()
    for compiled in (step(batch.q_latent), step(batch.q_latent, out)):
        assert torch.equal(compiled.out, eager.out)
        assert torch.equal(compiled.lse, eager.lse)
    assert torch.equal(out, eager.out)
